"""FFF: pairs that the data wrongly calls negatives are found and trained as positives (arXiv 2405.10286)."""

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
from clipfix.parts.objective import Objective, counted
from clipfix.training.phases import Training
from clipfix.training.sharding import unsharded


class FFF(Method):
    """Both towers learn from several captions of each image, and from other pairs of the batch that belong together.

    With one text, no mining and `Softmax`, this is plain contrastive fine-tuning.

    Args:
        texts: names of the captions of each image that enter the loss.
        mining: finds positives among the other samples of the joined batch, all ranks together.
        objective: `Sigmoid` (paper) or `Softmax`.
        start_scale: inverse temperature at the start; None for the model's own.

    Source: FFF (arXiv 2405.10286), sections 3.2 to 3.4. No code was published; where the text leaves a choice, it is a
    key of the yaml.
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
        """The cosines found on the first batch belong in the checkpoint, though no gradient reaches them."""
        return super().trained_names() | {"mining.cosines"}

    @torch.no_grad()
    def start(self, batches: Iterable[dict[str, Any]]) -> None:
        """Find cosines that give the counts asked for, and the offset that suits the model, on the first batch."""
        batch = next(iter(batches))
        samples = self.mining.fit(self.mining.samples(batch))
        with unsharded(self):
            image = self.ranks.gather(image_features(self.backbone, batch))
            text = self.ranks.gather(self.texts(batch))
        self.objective.start(image, text, self.scale, partial(self.mining.positives, samples, samples, 0))

    def loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        image, text = image_features(self.backbone, batch), self.texts(batch)
        samples, first = self.mining.samples(batch), self.ranks.rank * len(image)
        own: Samples = samples.rows(slice(first, first + len(image)))
        counts: dict[str, Any] = defaultdict(int)  # tensors, so that no tile waits for the device
        of_images = partial(self.mining.positives, own, samples, first, counts=counts)
        of_texts = partial(self.mining.positives, samples, own, -first, slice(None))
        term = self.objective(image, text, self.scale, of_images, of_texts, self.ranks)
        self.notes |= counted(counts, len(image) * samples.captions, samples.size - 1)
        return {self.objective.name: term}

    def texts(self, batch: dict[str, Any]) -> Float[Tensor, "b k d"]:
        """Return features of the captions of each image, in the order of `texts`."""
        return torch.cat(list(text_features(self.backbone, batch, self.names, "tokens").values()), dim=1)
