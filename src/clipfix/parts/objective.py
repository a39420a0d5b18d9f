"""Objectives: losses of images and captions with any number of positives for each."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from clipfix.functional.contrastive import many_positives_loss
from clipfix.functional.sigmoid import best_bias, sigmoid_loss
from clipfix.training.ranks import Ranks
from clipfix.training.sharding import shared

# Returns which captions of a slice of the joined batch are positives of this rank's images: [b, t, k].
ImagePositives = Callable[[slice], Bool[Tensor, "b t k"]]
# Returns which captions of this rank are positives of the joined batch's images: [n, b, k].
TextPositives = Callable[[], Bool[Tensor, "n b k"]]


class Objective(nn.Module, ABC):
    """A loss of this rank's images and captions against those of all ranks. `name` is the name of its loss term."""

    name: str

    def start(self, image: Tensor, text: Tensor, scale: Tensor, of_images: ImagePositives) -> None:
        """Initialize from the features of the first batch of all ranks. Default: do nothing."""

    def adopt(self, bias: nn.Parameter) -> None:
        """Train the logit bias of a model that has one (SigLIP), so that exports of the model hold it.

        Raises:
            ValueError: if this loss has no bias.
        """
        raise ValueError(
            f"method.objective is {self.name}, and the backbone is trained with the sigmoid loss and its logit bias: "
            "set objective@method.objective=sigmoid."
        )

    @abstractmethod
    def forward(
        self,
        image: Float[Tensor, "b d"],
        text: Float[Tensor, "b k d"],
        scale: Float[Tensor, ""],
        of_images: ImagePositives,
        of_texts: TextPositives,
        ranks: Ranks,
    ) -> Float[Tensor, ""]:
        """Return the loss.

        Args:
            image: image features of this rank, of unit norm.
            text: features of the k captions of each image of this rank, of unit norm.
            scale: inverse temperature.
            of_images: returns the positives of this rank's images.
            of_texts: returns the positives of this rank's captions.
            ranks: gathers features of all ranks.
        """


class Sigmoid(Objective):
    """Pairwise sigmoid loss; see `sigmoid_loss`. Its offset -beta is trained.

    Args:
        mean_over: `entries` divides the sum by all images times texts (FFF), `images` by the images (SigLIP).
        start_bias: initial offset; None for the one that minimizes the loss on the first batch, as in the paper.
        tile: number of samples whose logits are held at once. It bounds memory and changes no value.

    Source: FFF (arXiv 2405.10286), section 3.4; SigLIP (arXiv 2303.15343), equation 1.
    Departs: the offset is fitted on the first batch of all ranks, and not on several batches.
    """

    name = "sigmoid"

    def __init__(self, mean_over: str, start_bias: float | None, tile: int) -> None:
        super().__init__()
        if mean_over not in ("entries", "images"):
            raise ValueError(f"method.objective.mean_over is {mean_over}: choose entries or images.")
        if tile < 1:
            raise ValueError(f"method.objective.tile is {tile}: score 1 or more samples at a time.")
        self.mean_over, self.start_bias, self.tile = mean_over, start_bias, tile
        self.bias, self.adopted = nn.Parameter(torch.tensor(start_bias or 0.0)), False

    def adopt(self, bias: nn.Parameter) -> None:
        if self.start_bias is not None:
            raise ValueError(
                f"method.objective.start_bias is {self.start_bias}, and the backbone has a logit bias of its own: set "
                "it to null."
            )
        self.bias, self.adopted = bias, True

    def start(self, image: Tensor, text: Tensor, scale: Tensor, of_images: ImagePositives) -> None:
        if self.start_bias is None and not self.adopted:
            shared(self.bias).copy_(best_bias(image, text, scale, of_images, self.tile))

    def forward(
        self,
        image: Float[Tensor, "b d"],
        text: Float[Tensor, "b k d"],
        scale: Float[Tensor, ""],
        of_images: ImagePositives,
        of_texts: TextPositives,
        ranks: Ranks,
    ) -> Float[Tensor, ""]:
        all_text = ranks.gather(text)
        total = sigmoid_loss(image, all_text, scale, shared(self.bias), of_images, self.tile)
        return total / (len(image) if self.mean_over == "images" else len(image) * all_text[..., 0].numel())


class Softmax(Objective):
    """Symmetric cross-entropy with a uniform target over the positives. The control for `Sigmoid`.

    It holds the whole similarity matrix of the joined batch.
    """

    name = "softmax"

    def forward(
        self,
        image: Float[Tensor, "b d"],
        text: Float[Tensor, "b k d"],
        scale: Float[Tensor, ""],
        of_images: ImagePositives,
        of_texts: TextPositives,
        ranks: Ranks,
    ) -> Float[Tensor, ""]:
        all_text = ranks.gather(text)
        for_image, for_text = of_images(slice(None)).flatten(1), of_texts().flatten(1).T
        return (
            many_positives_loss(image, all_text.flatten(0, 1), for_image, scale)
            + many_positives_loss(text.flatten(0, 1), ranks.gather(image), for_text, scale)
        ) / 2


def positives_notes(counts: dict[str, Any], per_image: int, others: int) -> dict[str, Any]:
    """Return values to log: the number of positives by reason, for each image and in percent of the other samples.

    Args:
        counts: number of positive captions of this rank's images, by reason.
        per_image: number of captions of this rank's images. A sample whose captions are all positives counts as 1.
        others: number of other samples in the joined batch.
    """
    notes: dict[str, Any] = {}
    for name, count in counts.items():
        mean = count / per_image
        notes |= {f"positives/{name}_per_image": mean, f"positives/{name}_percent": 100 * mean / max(1, others)}
    return notes
