"""Contrastive losses between images and texts."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from clipfix.functional.fused import fused

LARGEST = 2**26  # similarities held at once, 256 MB in fp32; ours


def contrastive_loss(
    image: Float[Tensor, "b d"],
    text: Float[Tensor, "b d"],
    all_image: Float[Tensor, "n d"],
    all_text: Float[Tensor, "n d"],
    scale: Float[Tensor, ""],
    first_row: int,
    label_smoothing: float = 0.0,
    largest: int = LARGEST,
) -> Float[Tensor, ""]:
    """Symmetric cross-entropy of this rank's rows against the joined batch.

    Features are L2-normalized; `scale` multiplies cosines (1 / temperature). Row i of this rank is row `first_row + i`
    of the joined batch, and that is its only positive. Each rank scores b x n similarities, not n x n, and the mean
    over ranks is the loss of the joined batch. Where these are more than `largest`, so many are held at a time.

    Source: CLIP (arXiv 2103.00020), figure 3; the rank-local form is the one used by large-batch CLIP trainers.
    """
    targets = torch.arange(len(image), device=image.device) + first_row
    # Mixed precision stops here: at scale 100 the nearest two bf16 logits lie half a unit apart.
    with torch.autocast(image.device.type, enabled=False):
        if len(image) * len(all_text) > largest:
            rows = max(1, largest // len(all_text))
            image_to_text = ChunkedCrossEntropy.apply(image, all_text, scale, targets, label_smoothing, rows)
            text_to_image = ChunkedCrossEntropy.apply(text, all_image, scale, targets, label_smoothing, rows)
        else:
            image_to_text = F.cross_entropy(scale * image @ all_text.T, targets, label_smoothing=label_smoothing)
            text_to_image = F.cross_entropy(scale * text @ all_image.T, targets, label_smoothing=label_smoothing)
    return (image_to_text + text_to_image) / 2


@fused
def _chunk(
    cosines: Float[Tensor, "c n"], scale: Float[Tensor, ""], targets: Int[Tensor, " c"], label_smoothing: float
) -> tuple[Float[Tensor, " c"], Float[Tensor, "c n"]]:
    """Return each row's cross-entropy, and its slope in each logit."""
    logits = scale * cosines
    columns = torch.arange(logits.shape[1], device=logits.device)
    own = (columns == targets[:, None]).to(logits.dtype)
    target = own * (1 - label_smoothing) + label_smoothing / logits.shape[1]
    log_likelihood = logits.log_softmax(dim=1)
    return -(target * log_likelihood).sum(dim=1), log_likelihood.exp() - target


class ChunkedCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of scaled cosines, and its gradient in the same pass, some rows at a time.

    A row of similarities is all that its loss needs, so a chunk of rows gives its gradient and is forgotten.
    """

    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        answers: Tensor,
        scale: Tensor,
        targets: Tensor,
        label_smoothing: float,
        rows: int,
    ) -> Tensor:
        q, a, factor = queries.detach(), answers.detach(), scale.detach()
        total = torch.zeros((), dtype=torch.float64, device=q.device)
        to_queries, to_answers = torch.empty_like(q), torch.zeros_like(a)
        for start in range(0, len(q), rows):
            part = slice(start, start + rows)
            loss, slopes = _chunk(q[part] @ a.T, factor, targets[part], label_smoothing)
            total += loss.sum(dtype=torch.float64)
            to_queries[part] = slopes @ a
            to_answers.addmm_(slopes.T, q[part])
        to_scale = (to_queries * q).sum(dtype=torch.float64)  # the cosines, each times its slope
        mean = 1 / len(q)
        gradients = (to_queries.mul_(factor * mean), to_answers.mul_(factor * mean), (to_scale * mean).to(scale.dtype))
        ctx.save_for_backward(*gradients)
        return (total * mean).to(q.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return (*(gradient * saved for saved in ctx.saved_tensors), None, None, None)


def many_positives_loss(
    queries: Float[Tensor, "b d"],
    answers: Float[Tensor, "m d"],
    positives: Bool[Tensor, "b m"],
    scale: Float[Tensor, ""],
) -> Float[Tensor, ""]:
    """Cross-entropy against all answers, averaged over the positives of each query, then over queries.

    Features are L2-normalized; every query needs a positive. The target is spread evenly over a query's positives, so
    the loss of a perfect model is the mean log of their number. Source: SupCon (arXiv 2004.11362), equation 2.
    """
    with torch.autocast(queries.device.type, enabled=False):
        target = positives / positives.sum(dim=1, keepdim=True)
        return F.cross_entropy(scale * queries @ answers.T, target)
