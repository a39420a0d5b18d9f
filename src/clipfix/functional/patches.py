"""Visual tokens of a condition: which patches join the class token, and how the null text is added."""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

Patches = Float[Tensor, "b n d"]
Picked = Float[Tensor, "b m d"]
Sample = Callable[..., Tensor]  # `sample(sampler, *args, rows=b, shape=...)`: seeded random draws for b images


class PatchRule(ABC):
    """A rule that picks or averages patches of each image."""

    @abstractmethod
    def __call__(self, patches: Patches, sample: Sample) -> Picked:
        """Return m tokens for each image, made from its n patches; `sample` gives random draws."""


class NoPatches(PatchRule):
    """No patch, so that the class token is the only token."""

    def __call__(self, patches: Patches, sample: Sample) -> Picked:
        return patches[:, :0]


class AllPatches(PatchRule):
    """Every patch."""

    def __call__(self, patches: Patches, sample: Sample) -> Picked:
        return patches


class RandomPatches(PatchRule):
    """Some patches of each image, drawn with replacement.

    Args:
        amount: number of patches.
    """

    def __init__(self, amount: int) -> None:
        self.amount = amount

    def __call__(self, patches: Patches, sample: Sample) -> Picked:
        indices = sample(torch.randint, 0, patches.shape[1], rows=len(patches), shape=(self.amount,))
        return take_patches(patches, indices)


class ShareOfPatches(PatchRule):
    """A random fraction of each image's patches, drawn without replacement.

    Args:
        share: the fraction.
    """

    def __init__(self, share: float) -> None:
        self.share = share

    def __call__(self, patches: Patches, sample: Sample) -> Picked:
        order = sample(torch.rand, rows=len(patches), shape=(patches.shape[1],)).argsort(dim=1)
        return take_patches(patches, order[:, : round(self.share * patches.shape[1])])


class AveragePatches(PatchRule):
    """Averages over square tiles of the patch grid. Incomplete tiles at the border are left out.

    Args:
        side: side of a tile, in patches.

    Raises:
        ValueError: when called with patches that are not a square grid, or a grid smaller than a tile.
    """

    def __init__(self, side: int) -> None:
        self.side = side

    def __call__(self, patches: Patches, sample: Sample) -> Picked:
        batch, count, width = patches.shape
        grid_side = round(count**0.5)
        if grid_side * grid_side != count or not 1 <= self.side <= grid_side:
            raise ValueError(f"side is {self.side}: set it so that a square tile fits into a grid of {count} patches.")
        grid = patches.transpose(1, 2).reshape(batch, width, grid_side, grid_side)
        return F.avg_pool2d(grid, self.side).flatten(2).transpose(1, 2)


def take_patches(patches: Patches, indices: Int[Tensor, "b m"]) -> Picked:
    """Return the patches `indices[b]` of each image b; an index may occur more than once."""
    return patches.gather(1, indices[..., None].expand(-1, -1, patches.shape[-1]))


def condition_from_tokens(
    tokens: Float[Tensor, "b m c"], null: Float[Tensor, "t c"], null_text: str
) -> Float[Tensor, "b m c"]:
    """Return projected visual tokens plus the null text, in the diffusion model's cross-attention space.

    Args:
        tokens: projected visual tokens.
        null: tokens of the empty text.
        null_text: `tokenwise` adds null token i to visual token i, and needs as many visual tokens as null tokens;
            `mean` adds the mean null token to each visual token.

    Raises:
        ValueError: if `null_text` is `tokenwise` and the numbers of tokens differ.

    Source: DIVA (arXiv 2407.20171), section 3.3; both variants are in the authors' code.
    """
    if null_text == "mean":
        return tokens + null.mean(0)
    if tokens.shape[1] != len(null):
        raise ValueError(
            f"null_text is tokenwise, with {tokens.shape[1]} visual tokens and {len(null)} null tokens: pick "
            f"{len(null) - 1} patches beside the class token, or set it to mean."
        )
    return tokens + null
