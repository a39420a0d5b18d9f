"""Other views of the same pictures."""

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
    """A part of each picture, resized to the whole: its share of the area, and how much wider than high it is.

    `uniform` holds draws in [0, 1) for share, log ratio and the place, x before y. A part that would be wider or higher
    than its picture ends at the border.

    Source: the random resized crop of Inception (arXiv 1409.4842), section 6.
    """
    share = area[0] + uniform[:, 0] * (area[1] - area[0])
    low, high = torch.tensor(ratio).log().tolist()
    stretch = (low + uniform[:, 1] * (high - low)).exp()
    sides = torch.stack([(share * stretch).sqrt(), (share / stretch).sqrt()], dim=1).clamp(max=1)
    centres = (2 * uniform[:, 2:] - 1) * (1 - sides)  # pictures reach from -1 to 1
    boxes = torch.cat([torch.diag_embed(sides), centres[..., None]], dim=2)
    grid = F.affine_grid(boxes, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid.to(images.dtype), padding_mode="border", align_corners=False)
