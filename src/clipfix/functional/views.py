"""Augmented views of images."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def random_crops(
    images: Float[Tensor, "b 3 h w"],
    uniform: Float[Tensor, "b 4"],
    area: Sequence[float],
    ratio: Sequence[float],
) -> Float[Tensor, "b 3 h w"]:
    """Return a random crop of each image, resized to the size of the image.

    A crop that would be wider or higher than the image is cut at its border.

    Args:
        images: images in [0, 1].
        uniform: draws in [0, 1) for the area, the logarithm of the ratio, and the position x, y of each crop.
        area: smallest and largest fraction of the image's area.
        ratio: smallest and largest ratio of the crop's width to its height.

    Source: the random resized crop of Inception (arXiv 1409.4842), section 6.
    """
    share = area[0] + uniform[:, 0] * (area[1] - area[0])
    low, high = torch.tensor(ratio).log().tolist()
    stretch = (low + uniform[:, 1] * (high - low)).exp()
    sides = torch.stack([(share * stretch).sqrt(), (share / stretch).sqrt()], dim=1).clamp(max=1)
    centres = (2 * uniform[:, 2:] - 1) * (1 - sides)  # the grid of an image reaches from -1 to 1
    boxes = torch.cat([torch.diag_embed(sides), centres[..., None]], dim=2)
    grid = F.affine_grid(boxes, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid.to(images.dtype), padding_mode="border", align_corners=False)
