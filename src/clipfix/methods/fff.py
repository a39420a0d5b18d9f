"""FFF: finds false negatives among the pairs of a batch and trains on them as positives (arXiv 2405.10286)."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from clipfix.methods.base import Method
from clipfix.models.clip import Backbone
from clipfix.parts.mining import Mining, Samples, image_features, text_features
from clipfix.parts.objective import Objective, positives_notes
from clipfix.training.phases import Training
from clipfix.training.sharding import unsharded


class FFF(Method):
    """Both towers are trained on several captions of each image and on mined positives.

    With one text, no mining and `Softmax`, this is plain contrastive fine-tuning.

    Args:
        texts: names of the captions of each image that enter the loss.
        mining: finds positives among the other samples of the joined batch of all ranks.
        objective: `Sigmoid` (paper) or `Softmax`.
        start_scale: initial inverse temperature; None for the pretrained one.

    Source: FFF (arXiv 2405.10286), sections 3.2 to 3.4. No code was published; what the text leaves
    open is an option of the config.
    """

    memory: ClassVar[tuple[str, ...]] = ("method.objective.tile",)

    def __init__(
        self,
        backbone: Backbone,
        texts: Sequence[str],
        mining: Mining,
        objective: Objective,
        start_scale: float | None,
        **training: Unpack[Training],
    ):
        super().__init__(backbone, **training)
        if not texts:
            raise ValueError("method.texts is empty: name one or more of data.texts, as in method.texts=[captions].")
        self.names, self.mining, self.objective = tuple(texts), mining, objective
        if backbone.logit_bias is not None:
            objective.adopt(backbone.logit_bias)
        mining.attach(texts, self.ranks)
        needs = self.clip_needs(*texts)
        self.needs = replace(
            needs,
            texts=tuple(dict.fromkeys((*texts, *mining.texts))),
            encode=(*needs.encode, *mining.encode),
            features=mining.from_shards,
        )
        backbone.requires_grad_(True)
        if start_scale is not None:
            backbone.logit_scale.data.fill_(start_scale).log_()

    def trained_names(self) -> set[str]:
        """Add the cosines found on the first batch to the trained weights, although they have no gradient."""
        return super().trained_names() | {"mining.cosines"}

    @torch.no_grad()
    def start(self, batches: Iterable[dict[str, Any]]) -> None:
        """On the first batch, turn counts into cosines and initialize the objective."""
        batch = next(iter(batches))
        samples = self.mining.fit(self.mining.samples(batch))
        with unsharded(self):
            image = self.ranks.gather(image_features(self.backbone, batch))
            text = self.ranks.gather(self.texts(batch))
        self.objective.start(image, text, self.scale, partial(self.mining.positives, samples, samples, 0))

    def loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        image, text = image_features(self.backbone, batch), self.texts(batch)
        samples, first = self.mining.samples(batch), self.ranks.rank * len(image)
        of_rank: Samples = samples.rows(slice(first, first + len(image)))
        counts: dict[str, Any] = defaultdict(int)  # of tensors, so that no tile synchronizes with the device
        of_images = partial(self.mining.positives, of_rank, samples, first, counts=counts)
        of_texts = partial(self.mining.positives, samples, of_rank, -first, slice(None))
        term = self.objective(image, text, self.scale, of_images, of_texts, self.ranks)
        self.notes |= positives_notes(counts, len(image) * samples.captions, samples.size - 1)
        return {self.objective.name: term}

    def texts(self, batch: dict[str, Any]) -> Float[Tensor, "b k d"]:
        """Return features of the captions of each image, in the order of `texts`."""
        return torch.cat(list(text_features(self.backbone, batch, self.names, "tokens").values()), dim=1)
