"""Which patches join the class token in a condition, and how the null text joins them all."""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

Patches = Float[Tensor, "b n d"]
Picked = Float[Tensor, "b m d"]
Draw = Callable[..., Tensor]  # `draw(sampler, *args, rows=b, shape=...)`: seeded draws for b images


class PatchRule(ABC):
    """Picks or averages patches of each image."""

    @abstractmethod
    def __call__(self, patches: Patches, draw: Draw) -> Picked:
        """Return m tokens made of the n patches of each image."""


class NoPatches(PatchRule):
    """No patch: the class token stays alone."""

    def __call__(self, patches: Patches, draw: Draw) -> Picked:
        return patches[:, :0]


class AllPatches(PatchRule):
    """Every patch."""

    def __call__(self, patches: Patches, draw: Draw) -> Picked:
        return patches


class RandomPatches(PatchRule):
    """`amount` patches of each image, drawn with replacement."""

    def __init__(self, amount: int) -> None:
        self.amount = amount

    def __call__(self, patches: Patches, draw: Draw) -> Picked:
        indices = draw(torch.randint, 0, patches.shape[1], rows=len(patches), shape=(self.amount,))
        return take_patches(patches, indices)


class ShareOfPatches(PatchRule):
    """A random share of each image's patches, without replacement."""

    def __init__(self, share: float) -> None:
        self.share = share

    def __call__(self, patches: Patches, draw: Draw) -> Picked:
        order = draw(torch.rand, rows=len(patches), shape=(patches.shape[1],)).argsort(dim=1)
        return take_patches(patches, order[:, : round(self.share * patches.shape[1])])


class AveragePatches(PatchRule):
    """Averages over `side` x `side` tiles of the square patch grid; an incomplete last tile is left out."""

    def __init__(self, side: int) -> None:
        self.side = side

    def __call__(self, patches: Patches, draw: Draw) -> Picked:
        batch, count, width = patches.shape
        grid_side = round(count**0.5)
        if grid_side * grid_side != count or not 1 <= self.side <= grid_side:
            raise ValueError(f"Tiles of {self.side} x {self.side} do not fit into an image of {count} patches.")
        grid = patches.transpose(1, 2).reshape(batch, width, grid_side, grid_side)
        return F.avg_pool2d(grid, self.side).flatten(2).transpose(1, 2)


def take_patches(patches: Patches, indices: Int[Tensor, "b m"]) -> Picked:
    """Return for image b its patches `indices[b]`, repeats included."""
    return patches.gather(1, indices[..., None].expand(-1, -1, patches.shape[-1]))


def condition_from_tokens(
    tokens: Float[Tensor, "b m c"], null: Float[Tensor, "t c"], null_text: str
) -> Float[Tensor, "b m c"]:
    """Return projected visual tokens on top of the null text, in the diffusion model's cross-attention space.

    `tokenwise` adds token i to null token i and needs as many visual tokens as null tokens; `mean` adds the average
    null token to each, whatever their number.

    Source: DIVA (arXiv 2407.20171), section 3.3; the two variants are the reference code's.
    """
    if null_text == "mean":
        return tokens + null.mean(0)
    if tokens.shape[1] != len(null):
        raise ValueError(
            f"null_text=tokenwise adds {tokens.shape[1]} visual tokens to {len(null)} null tokens: give "
            f"{len(null) - 1} patches beside the class token, or set null_text=mean."
        )
    return tokens + null
