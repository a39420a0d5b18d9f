"""The loss by which a diffusion model judges the condition that it is given."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from clipfix.functional.denoising import contrastive_denoising_loss, denoising_loss
from clipfix.functional.views import random_crops
from clipfix.training.ranks import Ranks

# The diffusion model's prediction for the noisy latents of a batch, under a condition [b, m, c].
Predict = Callable[[Float[Tensor, "b m c"]], Float[Tensor, "n z y x"]]


class Feedback(ABC):
    """A loss of predictions under the conditions of a batch. `name` is that of the loss term."""

    name: str

    def views(self, images: Float[Tensor, "b 3 h w"], ranks: Ranks) -> Float[Tensor, "b 3 h w"] | None:
        """Return augmented views of the images whose conditions the loss needs too; None if it needs none."""
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
        """Return the loss under the condition of each image, and of its augmented view."""


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
    """DCR: the prediction under an image's condition must be nearer to the true noise, and to the prediction under the
    condition of an augmented view, than to those under the conditions of other images.

    As in the authors' code, gradients flow through every condition. n negatives cost n + 2 passes of the U-Net, and
    the activations of as many, where `Denoising` costs one.

    Args:
        temperature: of the softmax over cosines.
        negatives: other images that each image is compared with.
        crop_area: least and greatest share of the picture in an augmented view.
        crop_ratio: least and greatest ratio of its width to its height.

    Source: DCR (arXiv 2603.04803), from its abstract and its authors' code.
    Departs: DCR takes all other images of a rank as negatives; here a few of the joined batch are. Its views are also
    flipped and recoloured, which is left out here, because left, right, up, down and colours are among the faults to
    repair. Its projection has two layers. It always compares with v, the target of its Stable Diffusion.
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
            raise ValueError(f"{key}.crop_area is {list(crop_area)}: give two shares, above 0 and up to 1, in order.")
        if not 0 < crop_ratio[0] <= crop_ratio[1]:
            raise ValueError(f"{key}.crop_ratio is {list(crop_ratio)}: give two ratios, above 0 and in order.")
        self.temperature, self.negatives = temperature, negatives
        self.crop_area, self.crop_ratio = crop_area, crop_ratio

    def views(self, images: Float[Tensor, "b 3 h w"], ranks: Ranks) -> Float[Tensor, "b 3 h w"]:
        """Return a crop of each image; not flipped, because left is not right."""
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
        # Less than half a batch further on. The shuffled control takes conditions from half a batch further on, and
        # the right condition must not be one of its negatives.
        others = [of_others(condition, ranks, n, 2 * (self.negatives + 1)) for n in range(1, self.negatives + 1)]
        positives = torch.stack([target, predict(view)], dim=1)
        negatives = torch.stack([predict(other) for other in others], dim=1)
        return contrastive_denoising_loss(predict(condition), positives, negatives, self.temperature)


def of_others(condition: Float[Tensor, "b m c"], ranks: Ranks, part: int = 1, parts: int = 2) -> Float[Tensor, "b m c"]:
    """Return for each image the condition of the image `part / parts` of the joined batch further on.

    The default is half a batch, as far away as possible: where look-alikes follow each other, the condition of the
    next image would be almost right.
    """
    joined = ranks.gather(condition)
    if ranks.training and len(joined) < parts:  # the last batch of a validation split may be that short
        raise ValueError(
            f"A batch of {len(joined)} has too few other images to take conditions from: raise data.batch_size, so "
            f"that all ranks together have {parts} images, or lower method.feedback.negatives."
        )
    return joined.roll(-(len(joined) * part // parts), dims=0)[ranks.rank * len(condition) :][: len(condition)]
