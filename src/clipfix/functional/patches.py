"""What DIVA makes of visual tokens: which patches join the class token, and how the null text joins them all."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

Patches = Float[Tensor, "b n d"]
Picked = Float[Tensor, "b m d"]
Draw = Callable[..., Tensor]  # Method.draw: this rank's rows of a seeded draw for the joined batch


# -- which patches join the class token; `method.patches` names one ----------------------------------------------------


def no_patches(patches: Patches, draw: Draw, amount: None) -> Picked:
    """None: the class token alone."""
    return patches[:, :0]


def all_patches(patches: Patches, draw: Draw, amount: None) -> Picked:
    """Every patch."""
    return patches


def random_patches(patches: Patches, draw: Draw, amount: int) -> Picked:
    """`amount` patches of each image, drawn with replacement."""
    indices = draw(torch.randint, 0, patches.shape[1], rows=len(patches), shape=(amount,))
    return take_patches(patches, indices)


def share_of_patches(patches: Patches, draw: Draw, amount: float) -> Picked:
    """A random share `amount` of each image's patches, without replacement."""
    order = draw(torch.rand, rows=len(patches), shape=(patches.shape[1],)).argsort(dim=1)
    return take_patches(patches, order[:, : round(amount * patches.shape[1])])


def average_patches(patches: Patches, draw: Draw, amount: int) -> Picked:
    """Averages over `amount` x `amount` tiles of the square patch grid; an incomplete last tile is left out."""
    batch, count, width = patches.shape
    side = round(count**0.5)
    if side * side != count or amount > side:
        raise ValueError(f"method.patch_amount={amount} does not tile a picture of {count} patches.")
    grid = patches.transpose(1, 2).reshape(batch, width, side, side)
    return F.avg_pool2d(grid, amount).flatten(2).transpose(1, 2)


# Each rule with the kind of amount it takes.
PATCH_RULES: dict[str, tuple[Callable[..., Tensor], type]] = {
    "none": (no_patches, type(None)),
    "all": (all_patches, type(None)),
    "random": (random_patches, int),
    "share": (share_of_patches, float),
    "average": (average_patches, int),
}


def take_patches(patches: Patches, indices: Int[Tensor, "b m"]) -> Picked:
    """Row b keeps its patches `indices[b]`, repeats included."""
    return patches.gather(1, indices[..., None].expand(-1, -1, patches.shape[-1]))


def condition_from_tokens(
    tokens: Float[Tensor, "b m c"], null: Float[Tensor, "t c"], null_text: str
) -> Float[Tensor, "b m c"]:
    """Projected visual tokens on top of the null text, in the diffusion model's cross-attention space.

    `tokenwise` adds token i to null token i and needs as many visual tokens as null tokens; `mean` adds the average
    null token to each, whatever their number.

    Source: DIVA (arXiv 2407.20171), section 3.3; the two variants are the reference code's.
    """
    if null_text == "mean":
        return tokens + null.mean(0)
    if tokens.shape[1] != len(null):
        raise ValueError(
            f"method.null_text=tokenwise adds {tokens.shape[1]} visual tokens to {len(null)} null tokens: "
            f"draw {len(null) - 1} patches beside the class token, or set method.null_text=mean."
        )
    return tokens + null
