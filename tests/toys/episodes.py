"""A toy few-shot method that learns from episodes: support images with labels, and queries."""

from collections.abc import Iterator
from typing import Any, Unpack

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from clipfix.data.decoding import in_unit_range, samples, square
from clipfix.data.needs import Needs
from clipfix.evals.base import Benchmark, Scores
from clipfix.evals.features import Features
from clipfix.methods.base import Method
from clipfix.models.base import FewShot, Model, Wrapper
from clipfix.models.clip import Backbone
from clipfix.training.phases import Training

WAYS = 2


class Episodes(IterableDataset):
    """An endless stream of episodes: one support image and one query image for each class."""

    def __init__(self, shards: str, size: int, seed: int) -> None:
        self.shards, self.size, self.seed = shards, size, seed

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        by_label: dict[int, list[Tensor]] = {}
        for sample in samples(self.shards):
            image = (255 * square(sample["image"], self.size)).byte()
            by_label.setdefault(sample["json"]["label"], []).append(image)
        draws = torch.Generator().manual_seed(self.seed)
        while True:
            chosen = [
                [by_label[label][int(i)] for i in torch.randperm(len(by_label[label]), generator=draws)[:2]]
                for label in range(WAYS)
            ]
            # `image` first has the support, then the queries, each in the order of the classes.
            yield {"image": torch.stack([pair[0] for pair in chosen] + [pair[1] for pair in chosen])}


class EpisodeData(L.LightningDataModule):
    def __init__(self, train: str, selection: str | None, seed: int, needs: Needs) -> None:
        super().__init__()
        self.train, self.selection, self.seed, self.needs = train, selection, seed, needs

    def train_dataloader(self) -> DataLoader:
        return DataLoader(Episodes(self.train, self.needs.image_size, self.seed), batch_size=None)

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        return {**batch, "image": in_unit_range(batch["image"])}


class PrototypeModel(Wrapper):
    """Nearest prototype behind a linear layer."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__(backbone)
        self.layer = nn.Linear(backbone.embed_dim, backbone.embed_dim, bias=False)
        nn.init.eye_(self.layer.weight)

    def episode_logits(self, support: Tensor, labels: Tensor, queries: Tensor) -> Tensor:
        rows = [F.normalize(self.layer(self.encode_image(images).float()), dim=-1) for images in (support, queries)]
        ways = int(labels.max()) + 1
        prototypes = torch.stack([rows[0][labels == way].mean(0) for way in range(ways)])
        return 10 * rows[1] @ prototypes.T


class Prototypes(Method):
    def __init__(self, backbone: Backbone, weight: float, **training: Unpack[Training]) -> None:
        super().__init__(backbone, **training)
        backbone.requires_grad_(False)
        self.weight, self.model = weight, self.wrap(backbone)
        self.model.layer.requires_grad_(True)
        self.needs = Needs(backbone.image_size)

    def wrap(self, backbone: Backbone) -> Model:
        return PrototypeModel(backbone)

    def loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        support, queries = batch["image"].chunk(2)
        labels = torch.arange(WAYS, device=self.device)
        logits = self.model.episode_logits(support, labels, queries)
        return {"episode": self.weight * F.cross_entropy(logits, labels)}


class EpisodeAccuracy(Benchmark):
    def __init__(self, shards: str) -> None:
        self.shards = shards

    def score(self, features: Features) -> Scores:
        if not isinstance(features.model, FewShot):
            raise ValueError(f"eval: {type(features.model).__name__} classifies no episodes: choose another benchmark.")
        size, device = features.model.image_size, next(features.model.parameters()).device
        images = in_unit_range(next(iter(Episodes(self.shards, size, seed=1)))["image"]).to(device)
        labels = torch.arange(WAYS, device=device)
        support, queries = images.chunk(2)
        right = features.model.episode_logits(support, labels, queries).argmax(dim=1) == labels
        return Scores({"accuracy": 100 * right.float().mean().item()})
