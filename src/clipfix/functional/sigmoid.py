"""The pairwise sigmoid loss with any number of positives, in memory that grows with the batch and not its square."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from clipfix.functional.fused import fused

# Which texts of the samples in a slice are positives of which image: [b, slice, k].
Positives = Callable[[slice], Bool[Tensor, "b t k"]]


def sigmoid_loss(
    image: Float[Tensor, "b d"],
    text: Float[Tensor, "n k d"],
    scale: Float[Tensor, ""],
    bias: Float[Tensor, ""],
    positives: Positives,
    tile: int,
) -> Float[Tensor, ""]:
    """Sum over all images and texts of softplus(-m (scale cos + bias)), m = 1 for positives and -1 for the others.

    Features are L2-normalized. Divide by the images b (as SigLIP does) or by the entries b n k (the paper's mean).
    `tile` samples are scored at a time and their logits forgotten, so b x tile x k entries are held at once.

    Source: the loss of FFF (arXiv 2405.10286), where 1 / tau = scale and beta = -bias; with each image's own text as
    the one positive it is SigLIP's (arXiv 2303.15343), equation 1.
    """
    return TiledSigmoid.apply(image, text, scale, bias, positives, tile)


@torch.no_grad()
def best_bias(
    image: Float[Tensor, "b d"],
    text: Float[Tensor, "n k d"],
    scale: Float[Tensor, ""],
    positives: Positives,
    tile: int,
) -> Float[Tensor, ""]:
    """The bias at which the loss is least, to 1e-4: where its slope, which only rises with the bias, is zero.

    Source: FFF (arXiv 2405.10286) starts its offset there; how to find it is ours.
    """
    low, high = -(scale + 30), scale + 30  # beyond these every margin is saturated
    while high - low > 1e-4:
        middle = ((low + high) / 2).detach().requires_grad_()
        with torch.enable_grad():
            (slope,) = torch.autograd.grad(sigmoid_loss(image, text, scale, middle, positives, tile), middle)
        low, high = (middle.detach(), high) if slope < 0 else (low, middle.detach())
    return (low + high) / 2


def _in_place(
    entries: Float[Tensor, "b m"], positive: Bool[Tensor, "b m"], scale: Float[Tensor, ""], bias: Float[Tensor, ""]
) -> tuple[Float[Tensor, " b"], Float[Tensor, "b m"], Float[Tensor, " b"]]:
    """Return each row's loss, the slope of each entry's loss in its logit, and each row's slopes summed, from cosines.

    One matrix turns from cosines into logits, then into slopes, so that a tile is held once.
    """
    sign = positive.to(entries.dtype).mul_(-2).add_(1)  # of the logit in the loss
    entries.mul_(scale).add_(bias).mul_(sign)
    loss = F.softplus(entries).sum(dim=1)
    entries.sigmoid_().mul_(sign)
    return loss, entries, entries.sum(dim=1)


@fused
def _on_gpu(
    entries: Float[Tensor, "b m"], positive: Bool[Tensor, "b m"], scale: Float[Tensor, ""], bias: Float[Tensor, ""]
) -> tuple[Float[Tensor, " b"], Float[Tensor, "b m"], Float[Tensor, " b"]]:
    """The same as one kernel, which reads each entry once and writes it once."""
    sign = 1 - 2 * positive.to(entries.dtype)
    margin = (entries * scale + bias) * sign
    slope = margin.sigmoid() * sign
    return F.softplus(margin).sum(dim=1), slope, slope.sum(dim=1)


class TiledSigmoid(torch.autograd.Function):
    """Loss and gradients in one pass over tiles: the loss is a sum of entries, so each tile knows its own gradient."""

    @staticmethod
    def forward(
        ctx: Any, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, positives: Positives, tile: int
    ) -> Tensor:
        # Mixed precision stops here: at large scales bf16 logits lie half a unit apart.
        with torch.autocast(image.device.type, enabled=False):
            features, total = image.detach(), torch.zeros((), dtype=torch.float64, device=image.device)
            to_image, to_text, to_bias = torch.zeros_like(features), torch.zeros_like(text), torch.zeros_like(total)
            for start in range(0, len(text), tile):
                part = slice(start, start + tile)
                columns = text[part].detach().flatten(0, 1)
                positive = positives(part).flatten(1)
                entries = features @ columns.T
                loss, entries, slope = (_on_gpu if entries.is_cuda else _in_place)(entries, positive, scale, bias)
                total += loss.sum(dtype=torch.float64)  # over rows, as a sum in float64 copies its input
                to_bias += slope.sum(dtype=torch.float64)
                if ctx.needs_input_grad[0] or ctx.needs_input_grad[2]:
                    to_image.addmm_(entries, columns)
                if ctx.needs_input_grad[1]:
                    to_text[part] = (entries.T @ features).view_as(text[part])
                del positive, entries  # else they are held while the next tile is mined
            to_scale = (to_image * features).sum(dtype=torch.float64)  # the cosines, each times its slope
        gradients = (to_image.mul_(scale), to_text.mul_(scale), to_scale.to(scale.dtype), to_bias.to(bias.dtype))
        ctx.save_for_backward(*gradients)
        return total.to(image.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return (*(gradient * saved for saved in ctx.saved_tensors), None, None)
