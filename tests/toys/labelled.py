"""A toy few-shot method: labelled data, a cache that is filled at the start, and no steps."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Unpack

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from clipfix.data.decoding import in_unit_range, samples, square
from clipfix.data.needs import Needs
from clipfix.evals.base import Benchmark, Scores
from clipfix.evals.features import Features
from clipfix.methods.base import Method
from clipfix.models.base import Classifier, Model, Wrapper
from clipfix.models.clip import Backbone
from clipfix.training.phases import Training


class LabelledData(L.LightningDataModule):
    """Images with a class: shards whose json has `label`, a number."""

    def __init__(self, train: str, selection: str | None, batch_size: int, needs: Needs) -> None:
        super().__init__()
        self.train, self.selection, self.batch_size, self.needs = train, selection, batch_size, needs

    def train_dataloader(self) -> DataLoader:
        found = [
            {"image": (255 * square(one["image"], self.needs.image_size)).byte(), "label": one["json"]["label"]}
            for one in samples(self.train)
        ]
        return DataLoader(found, self.batch_size)

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        return {**batch, "image": in_unit_range(batch["image"])}


class CacheModel(Wrapper):
    """Zero-shot logits, and those of cached examples beside them. An empty cache is zero-shot."""

    def __init__(self, backbone: Backbone, shots: int, classes: Sequence[str]) -> None:
        super().__init__(backbone)
        self.classes = list(classes)
        self.register_buffer("keys", torch.zeros(shots * len(classes), backbone.embed_dim))
        self.register_buffer("values", torch.zeros(shots * len(classes), len(classes)))

    def class_logits(self, features: Tensor, classes: Sequence[str]) -> Tensor:
        assert list(classes) == self.classes
        text = F.normalize(self.encode_text(self.tokenize([f"a {name}" for name in classes])).float(), dim=-1)
        return features @ text.T + 10 * (features @ self.keys.T).exp() @ self.values


class Cache(Method):
    """Keeps features of labelled images. Only its buffers are in the checkpoint."""

    def __init__(self, backbone: Backbone, shots: int, classes: list[str], **training: Unpack[Training]) -> None:
        super().__init__(backbone, **training)
        backbone.requires_grad_(False)
        self.shots, self.classes = shots, classes
        self.model = self.wrap(backbone)
        self.needs = Needs(backbone.image_size)

    def wrap(self, backbone: Backbone) -> Model:
        return CacheModel(backbone, self.shots, self.classes)

    @torch.no_grad()
    def start(self, batches: Iterable[dict[str, Any]]) -> None:
        rows: list[int] = [0] * len(self.classes)
        for batch in batches:
            features = F.normalize(self.backbone.encode_image(batch["image"]).float(), dim=-1)
            for feature, label in zip(features, batch["label"].tolist(), strict=True):
                if rows[label] < self.shots:
                    row = label * self.shots + rows[label]
                    self.model.keys[row], self.model.values[row, label] = feature, 1
                    rows[label] += 1

    def trained_names(self) -> set[str]:
        return {"model.keys", "model.values"}

    def configure_optimizers(self) -> None:
        return None

    def loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        raise AssertionError("steps is 0")


class Accuracy(Benchmark):
    """Accuracy of a model's own classifier on labelled shards."""

    def __init__(self, shards: str, classes: list[str]) -> None:
        self.shards, self.classes = shards, classes

    def score(self, features: Features) -> Scores:
        if not isinstance(features.model, Classifier):
            raise ValueError(f"eval: {type(features.model).__name__} has no classifier: choose another benchmark.")
        images, kept = features.images(self.shards)
        logits = features.model.class_logits(images, self.classes)
        labels = torch.tensor([sample["json"]["label"] for sample in kept], device=logits.device)
        return Scores({"accuracy": 100 * (logits.argmax(dim=1) == labels).float().mean().item()})


def labelled(path: str) -> Iterator[int]:
    """Yield the labels of a shard."""
    yield from (sample["json"]["label"] for sample in samples(path))
