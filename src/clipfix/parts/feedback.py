"""Feedback: losses of a diffusion model under the conditions that it is given."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from clipfix.functional.denoising import contrastive_denoising_loss, denoising_loss
from clipfix.functional.views import random_crops
from clipfix.training.ranks import Ranks

# Returns the diffusion model's prediction for the noisy latents of a batch, under a condition [b, m, c].
Predict = Callable[[Float[Tensor, "b m c"]], Float[Tensor, "n z y x"]]


class Feedback(ABC):
    """A loss of predictions under the conditions of a batch. `name` is the name of its loss term."""

    name: str

    def views(self, images: Float[Tensor, "b 3 h w"], ranks: Ranks) -> Float[Tensor, "b 3 h w"] | None:
        """Return augmented views of the images, if the loss also needs their conditions. Default: None."""
        return None

    @abstractmethod
    def loss(
        self,
        predict: Predict,
        target: Float[Tensor, "n z y x"],
        condition: Float[Tensor, "b m c"],
        view: Float[Tensor, "b m c"] | None,
        ranks: Ranks,
    ) -> Float[Tensor, ""]:
        """Return the loss.

        Args:
            predict: returns the prediction under a condition; n rows, those of an image side by side.
            target: the target of the prediction.
            condition: condition of each image.
            view: condition of each augmented view; None if `views` returns none.
            ranks: for the conditions of other ranks.
        """


class Denoising(Feedback):
    """The error of the predicted noise. Source: DIVA (arXiv 2407.20171), equation 2."""

    name = "denoising"

    def loss(
        self,
        predict: Predict,
        target: Float[Tensor, "n z y x"],
        condition: Float[Tensor, "b m c"],
        view: Float[Tensor, "b m c"] | None,
        ranks: Ranks,
    ) -> Float[Tensor, ""]:
        return denoising_loss(predict(condition), target)


class Contrastive(Feedback):
    """DCR: a contrastive loss between predictions under the conditions of different images.

    The prediction under an image's condition must be nearer to the true noise, and to the prediction under the
    condition of an augmented view, than to the predictions under the conditions of other images.

    As in the authors' code, gradients flow through every condition. n negatives cost n + 2 passes of the U-Net
    and their activations; `Denoising` costs one.

    Args:
        temperature: temperature of the softmax over cosines.
        negatives: number of other images whose conditions are negatives for each image.
        crop_area: smallest and largest fraction of the image in an augmented view.
        crop_ratio: smallest and largest ratio of its width to its height.

    Source: DCR (arXiv 2603.04803), from its abstract and its authors' code.
    Departs: DCR takes all other images of a rank as negatives; here they are a few of the joined batch. DCR also flips
    and recolours its views; here they are not, because orientation and colour are among the faults to repair. DCR's
    projection has two layers. DCR always compares with v, the target of its version of Stable Diffusion.
    """

    name = "contrastive"

    def __init__(
        self, temperature: float, negatives: int, crop_area: Sequence[float], crop_ratio: Sequence[float]
    ) -> None:
        key = "method.feedback"
        if temperature <= 0:
            raise ValueError(f"{key}.temperature is {temperature}: set it above 0.")
        if negatives < 1:
            raise ValueError(f"{key}.negatives is {negatives}: set it to 1 or more.")
        if not 0 < crop_area[0] <= crop_area[1] <= 1:
            raise ValueError(
                f"{key}.crop_area is {list(crop_area)}: give two fractions, above 0 and up to 1, in order."
            )
        if not 0 < crop_ratio[0] <= crop_ratio[1]:
            raise ValueError(f"{key}.crop_ratio is {list(crop_ratio)}: give two ratios, above 0 and in order.")
        self.temperature, self.negatives = temperature, negatives
        self.crop_area, self.crop_ratio = crop_area, crop_ratio

    def views(self, images: Float[Tensor, "b 3 h w"], ranks: Ranks) -> Float[Tensor, "b 3 h w"]:
        """Return a random crop of each image. It is never flipped, because orientation matters."""
        uniform = ranks.sample(torch.rand, rows=len(images), shape=(4,))
        return random_crops(images, uniform, self.crop_area, self.crop_ratio)

    def loss(
        self,
        predict: Predict,
        target: Float[Tensor, "n z y x"],
        condition: Float[Tensor, "b m c"],
        view: Float[Tensor, "b m c"] | None,
        ranks: Ranks,
    ) -> Float[Tensor, ""]:
        assert view is not None
        # The offsets are below half a batch: the shuffled control shifts conditions by half a batch, and there the
        # image's own condition must not be among the negatives.
        others = [
            shifted_condition(condition, ranks, n, 2 * (self.negatives + 1)) for n in range(1, self.negatives + 1)
        ]
        positives = torch.stack([target, predict(view)], dim=1)
        negatives = torch.stack([predict(other) for other in others], dim=1)
        return contrastive_denoising_loss(predict(condition), positives, negatives, self.temperature)


def shifted_condition(
    condition: Float[Tensor, "b m c"], ranks: Ranks, part: int = 1, parts: int = 2
) -> Float[Tensor, "b m c"]:
    """Return for each image the condition of another image of the joined batch, shifted by `part / parts` of it.

    The default is half a batch, the largest distance: similar images may follow each other, and the condition of the
    next image would then be almost right.

    Raises:
        ValueError: in training, if the joined batch has fewer than `parts` images.
    """
    joined = ranks.gather(condition)
    if ranks.training and len(joined) < parts:  # the last batch of a validation split may be shorter
        raise ValueError(
            f"A batch of {len(joined)} has too few other images to take conditions from: raise data.batch_size, so "
            f"that all ranks together have {parts} images, or lower method.feedback.negatives."
        )
    return joined.roll(-(len(joined) * part // parts), dims=0)[ranks.rank * len(condition) :][: len(condition)]
