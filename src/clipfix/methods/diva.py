"""DIVA: a frozen text-to-image diffusion model tells CLIP's visual tower what it missed (arXiv 2407.20171)."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from clipfix.backbone import Backbone
from clipfix.diffusion import Diffusion
from clipfix.functional.denoising import denoising_loss
from clipfix.methods.base import Method

Patches = Float[Tensor, "b n d"]
Picked = Float[Tensor, "b m d"]
Draw = Callable[..., Tensor]  # Method.draw: this rank's rows of a seeded draw for the joined batch


# -- which patches join the class token in the condition; `method.patches` names one ----------------------------------


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


# -- the method --------------------------------------------------------------------------------------------------------


class DIVA(Method):
    """The visual tower learns to describe an image so well that a frozen diffusion model can denoise it.

    Trained: the visual tower and one linear projection from CLIP's joint space to the cross-attention space. The text
    tower and the whole diffusion model stay bit-identical. The tower runs once a batch, and all `draws` of noise and
    timestep share its tokens.

    Source: DIVA (arXiv 2407.20171), equation 2 and figure 3; token rules from the authors' code.
    Departs: the draws weigh the same (see `denoising_loss`); the VAE sees the image itself, where the reference
    un-normalizes it with the constants of another data set.
    """

    null: Tensor

    def __init__(
        self,
        backbone: Backbone,
        diffusion: Diffusion,
        patches: str,
        patch_amount: int | float | None,
        null_text: str,
        draws: int,
        optimizer: dict[str, Any],
        steps: int,
        warmup_steps: int,
    ):
        super().__init__(backbone, optimizer, steps, warmup_steps)
        if null_text not in ("tokenwise", "mean"):
            raise ValueError(f"method.null_text is {null_text}: choose tokenwise or mean.")
        if patches not in PATCH_RULES:
            raise ValueError(f"method.patches is {patches}: choose from {', '.join(PATCH_RULES)}.")
        rule, kind = PATCH_RULES[patches]
        if not isinstance(patch_amount, kind):
            raise ValueError(f"method.patch_amount is {patch_amount}: method.patches={patches} takes {kind.__name__}.")
        self.diffusion = diffusion
        self.pick_patches = partial(rule, draw=self.draw, amount=patch_amount)
        self.null_text = null_text
        self.draws = draws
        self.visual_proj = nn.Linear(backbone.embed_dim, diffusion.condition_dim)
        backbone.requires_grad_(False)
        backbone.visual.requires_grad_(True)
        # The null text never changes: one pass here instead of one a step.
        self.register_buffer("null", diffusion.condition([""])[0].float(), persistent=False)

    @property
    def image_size(self) -> int:
        return max(self.backbone.image_size, self.diffusion.image_size)

    def condition(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b m c"]:
        """What the diffusion model is told of each image."""
        pooled, patches = self.backbone.visual_tokens(images)
        tokens = torch.cat([pooled[:, None], self.pick_patches(patches)], dim=1)
        return condition_from_tokens(self.visual_proj(tokens), self.null, self.null_text)

    def loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        latents = self.diffusion.encode(batch["image"])
        condition = self.condition(batch["image"])
        rows, *shape = latents.shape
        noise = self.draw(torch.randn, rows=rows, shape=(self.draws, *shape)).flatten(0, 1)
        timesteps = self.draw(torch.randint, 0, self.diffusion.num_timesteps, rows=rows, shape=(self.draws,)).flatten()

        latents = latents.repeat_interleave(self.draws, dim=0)
        noisy = self.diffusion.add_noise(latents, noise, timesteps)
        predicted = self.diffusion.predict(noisy, timesteps, condition.repeat_interleave(self.draws, dim=0))
        return {"denoising": denoising_loss(predicted, self.diffusion.target(latents, noise, timesteps))}
