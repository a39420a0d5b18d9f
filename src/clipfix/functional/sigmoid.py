"""The pairwise sigmoid loss with any number of positives. Its memory grows linearly with the batch."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from clipfix.functional.fused import fused

# A function of a slice of the samples: it returns which of their texts are positives of each image, [b, slice, k].
PositivesOfSlice = Callable[[slice], Bool[Tensor, "b t k"]]


def sigmoid_loss(
    image: Float[Tensor, "b d"],
    text: Float[Tensor, "n k d"],
    scale: Float[Tensor, ""],
    bias: Float[Tensor, ""],
    positives: PositivesOfSlice,
    tile: int,
) -> Float[Tensor, ""]:
    """Return the sum over all images and texts of softplus(-m (scale cos + bias)); m is 1 for positives, else -1.

    Divide it by the number of images b (as SigLIP does) or of entries b n k (the mean of the FFF paper).

    Args:
        image: image features of unit norm.
        text: text features of unit norm, k for each sample.
        scale: inverse temperature, a factor on the cosines.
        bias: offset added to the scaled cosines.
        positives: returns which texts of a slice of the samples are positives of each image.
        tile: number of samples whose logits are held at once, b x tile x k entries. It changes no value.

    Source: the loss of FFF (arXiv 2405.10286), where 1 / tau = scale and beta = -bias; with each image's own text as
    the one positive it is SigLIP's (arXiv 2303.15343), equation 1.
    """
    return TiledSigmoid.apply(image, text, scale, bias, positives, tile)


@torch.no_grad()
def best_bias(
    image: Float[Tensor, "b d"],
    text: Float[Tensor, "n k d"],
    scale: Float[Tensor, ""],
    positives: PositivesOfSlice,
    tile: int,
) -> Float[Tensor, ""]:
    """Return the bias that minimizes `sigmoid_loss`, to within 1e-4. The other arguments are those of the loss.

    The loss is convex in the bias, so bisection finds where its derivative is zero.

    Source: FFF (arXiv 2405.10286) starts its offset there; the search is ours.
    """
    low, high = -(scale + 30), scale + 30  # the sigmoid is saturated for all entries at these ends
    while high - low > 1e-4:
        middle = ((low + high) / 2).detach().requires_grad_()
        with torch.enable_grad():
            (derivative,) = torch.autograd.grad(sigmoid_loss(image, text, scale, middle, positives, tile), middle)
        low, high = (middle.detach(), high) if derivative < 0 else (low, middle.detach())
    return (low + high) / 2


def _in_place(
    entries: Float[Tensor, "b m"], positive: Bool[Tensor, "b m"], scale: Float[Tensor, ""], bias: Float[Tensor, ""]
) -> tuple[Float[Tensor, " b"], Float[Tensor, "b m"], Float[Tensor, " b"]]:
    """Return, from cosines, the loss of each row, the derivative of the loss by each logit, and its sum over each row.

    The matrix of cosines is overwritten, first by logits and then by derivatives, so that a tile is held only once.
    """
    sign = positive.to(entries.dtype).mul_(-2).add_(1)  # -m
    entries.mul_(scale).add_(bias).mul_(sign)
    loss = F.softplus(entries).sum(dim=1)
    entries.sigmoid_().mul_(sign)
    return loss, entries, entries.sum(dim=1)


@fused
def _on_gpu(
    entries: Float[Tensor, "b m"], positive: Bool[Tensor, "b m"], scale: Float[Tensor, ""], bias: Float[Tensor, ""]
) -> tuple[Float[Tensor, " b"], Float[Tensor, "b m"], Float[Tensor, " b"]]:
    """Return the same values as `_in_place`, from one kernel that reads and writes each entry once."""
    sign = 1 - 2 * positive.to(entries.dtype)
    margin = (entries * scale + bias) * sign
    slope = margin.sigmoid() * sign
    return F.softplus(margin).sum(dim=1), slope, slope.sum(dim=1)


class TiledSigmoid(torch.autograd.Function):
    """The loss and its gradients, in one pass over tiles.

    The loss is a sum over entries, so the gradient of a tile does not depend on the other tiles.
    """

    @staticmethod
    def forward(
        ctx: Any, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, positives: PositivesOfSlice, tile: int
    ) -> Tensor:
        # Without mixed precision: at large scales neighbouring bf16 logits differ by half a unit.
        with torch.autocast(image.device.type, enabled=False):
            features, total = image.detach(), torch.zeros((), dtype=torch.float64, device=image.device)
            to_image, to_text, to_bias = torch.zeros_like(features), torch.zeros_like(text), torch.zeros_like(total)
            for start in range(0, len(text), tile):
                part = slice(start, start + tile)
                columns = text[part].detach().flatten(0, 1)
                positive = positives(part).flatten(1)
                entries = features @ columns.T
                loss, entries, slope = (_on_gpu if entries.is_cuda else _in_place)(entries, positive, scale, bias)
                total += loss.sum(dtype=torch.float64)  # of the rows, because a sum in float64 copies its input
                to_bias += slope.sum(dtype=torch.float64)
                if ctx.needs_input_grad[0] or ctx.needs_input_grad[2]:
                    to_image.addmm_(entries, columns)
                if ctx.needs_input_grad[1]:
                    to_text[part] = (entries.T @ features).view_as(text[part])
                del positive, entries  # otherwise they are held while `positives` computes the next tile
            to_scale = (to_image * features).sum(dtype=torch.float64)  # sum of cosine times derivative
        gradients = (to_image.mul_(scale), to_text.mul_(scale), to_scale.to(scale.dtype), to_bias.to(bias.dtype))
        ctx.save_for_backward(*gradients)
        return total.to(image.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return (*(gradient * saved for saved in ctx.saved_tensors), None, None)
