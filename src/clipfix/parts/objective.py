"""The loss of image-text pairs with any number of positives."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from clipfix.functional.contrastive import many_positives_loss
from clipfix.functional.sigmoid import best_bias, sigmoid_loss
from clipfix.training.ranks import Ranks
from clipfix.training.sharding import shared

# Which captions of a part of the joined batch are positives of this rank's images: [b, t, k].
OfImages = Callable[[slice], Bool[Tensor, "b t k"]]
# Which captions of this rank are positives of the joined batch's images: [n, b, k].
OfTexts = Callable[[], Bool[Tensor, "n b k"]]


class Objective(nn.Module, ABC):
    """A loss of this rank's images and captions against those of all ranks. `name` is that of the loss term."""

    name: str

    def start(self, image: Tensor, text: Tensor, scale: Tensor, of_images: OfImages) -> None:
        """Adapt to the features of the first batch, all ranks joined. By default, do nothing."""

    @abstractmethod
    def forward(
        self,
        image: Float[Tensor, "b d"],
        text: Float[Tensor, "b k d"],
        scale: Float[Tensor, ""],
        of_images: OfImages,
        of_texts: OfTexts,
        ranks: Ranks,
    ) -> Float[Tensor, ""]:
        """Return the loss of unit-norm features; `scale` is the inverse temperature."""


class Sigmoid(Objective):
    """Pairwise sigmoid loss; see `sigmoid_loss`. Its offset -beta trains.

    Args:
        mean_over: `entries` divides the sum by all images times texts (FFF), `images` by the images (SigLIP).
        start_bias: offset at the start; None for the one of least loss on the first batch, as in the paper.
        tile: samples scored at a time. It bounds memory and changes no value.

    Source: FFF (arXiv 2405.10286), section 3.4; SigLIP (arXiv 2303.15343), equation 1.
    Departs: the offset is fitted on the first batch of all ranks, and not on several batches.
    """

    name = "sigmoid"

    def __init__(self, mean_over: Literal["entries", "images"], start_bias: float | None, tile: int) -> None:
        super().__init__()
        if mean_over not in ("entries", "images"):
            raise ValueError(f"method.objective.mean_over is {mean_over}: choose entries or images.")
        if tile < 1:
            raise ValueError(f"method.objective.tile is {tile}: score 1 or more samples at a time.")
        self.mean_over, self.start_bias, self.tile = mean_over, start_bias, tile
        self.bias = nn.Parameter(torch.tensor(start_bias or 0.0))

    def start(self, image: Tensor, text: Tensor, scale: Tensor, of_images: OfImages) -> None:
        if self.start_bias is None:
            shared(self.bias).copy_(best_bias(image, text, scale, of_images, self.tile))

    def forward(
        self,
        image: Float[Tensor, "b d"],
        text: Float[Tensor, "b k d"],
        scale: Float[Tensor, ""],
        of_images: OfImages,
        of_texts: OfTexts,
        ranks: Ranks,
    ) -> Float[Tensor, ""]:
        all_text = ranks.gather(text)
        total = sigmoid_loss(image, all_text, scale, shared(self.bias), of_images, self.tile)
        return total / (len(image) if self.mean_over == "images" else len(image) * all_text[..., 0].numel())


class Softmax(Objective):
    """Cross-entropy spread evenly over the positives, both ways: the control that shows what the sigmoid is worth.

    It holds the whole similarity matrix of the joined batch.
    """

    name = "softmax"

    def forward(
        self,
        image: Float[Tensor, "b d"],
        text: Float[Tensor, "b k d"],
        scale: Float[Tensor, ""],
        of_images: OfImages,
        of_texts: OfTexts,
        ranks: Ranks,
    ) -> Float[Tensor, ""]:
        all_text = ranks.gather(text)
        for_image, for_text = of_images(slice(None)).flatten(1), of_texts().flatten(1).T
        return (
            many_positives_loss(image, all_text.flatten(0, 1), for_image, scale)
            + many_positives_loss(text.flatten(0, 1), ranks.gather(image), for_text, scale)
        ) / 2


def counted(counts: dict[str, Any], per_image: int, others: int) -> dict[str, Any]:
    """Return numbers of positives, by reason, as notes: per image and in percent of the other samples.

    Args:
        counts: number of positive captions of this rank's images, by reason.
        per_image: captions of all this rank's images: a sample counts 1 when all its captions are positives.
        others: samples in the batch besides the image's own.
    """
    notes: dict[str, Any] = {}
    for name, count in counts.items():
        each = count / per_image
        notes |= {f"positives/{name}_per_image": each, f"positives/{name}_percent": 100 * each / max(1, others)}
    return notes
