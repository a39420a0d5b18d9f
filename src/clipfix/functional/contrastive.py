"""Contrastive losses between images and texts."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from clipfix.functional.fused import fused

MAX_SIMILARITIES = 2**26  # held at once; 256 MB in fp32. Ours


def contrastive_loss(
    image: Float[Tensor, "b d"],
    text: Float[Tensor, "b d"],
    all_image: Float[Tensor, "n d"],
    all_text: Float[Tensor, "n d"],
    scale: Float[Tensor, ""],
    first_row: int,
    label_smoothing: float = 0.0,
    max_similarities: int = MAX_SIMILARITIES,
) -> Float[Tensor, ""]:
    """Return the symmetric cross-entropy of this rank's rows against the joined batch.

    Each rank computes b x n similarities, not n x n, and the mean over ranks is the loss of the joined batch.

    Args:
        image: image features of this rank, of unit norm.
        text: text features of this rank, of unit norm.
        all_image: image features of all ranks.
        all_text: text features of all ranks.
        scale: inverse temperature, a factor on the cosines.
        first_row: row i of this rank is row `first_row + i` of the joined batch, which is its only positive.
        label_smoothing: as in `torch.nn.functional.cross_entropy`.
        max_similarities: larger similarity matrices are computed in chunks of rows of at most this many entries.

    Source: CLIP (arXiv 2103.00020), figure 3; the rank-local form is the one used by large-batch CLIP trainers.
    """
    targets = torch.arange(len(image), device=image.device) + first_row
    # Without mixed precision: at scale 100 two neighbouring bf16 logits differ by half a unit.
    with torch.autocast(image.device.type, enabled=False):
        if len(image) * len(all_text) > max_similarities:
            rows = max(1, max_similarities // len(all_text))
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
    """Return the cross-entropy of each row, and its derivative with respect to each logit."""
    logits = scale * cosines
    columns = torch.arange(logits.shape[1], device=logits.device)
    one_hot = (columns == targets[:, None]).to(logits.dtype)
    target = one_hot * (1 - label_smoothing) + label_smoothing / logits.shape[1]
    log_likelihood = logits.log_softmax(dim=1)
    return -(target * log_likelihood).sum(dim=1), log_likelihood.exp() - target


class ChunkedCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of scaled cosines, with its gradient computed in the forward pass, `rows` rows at a time.

    The loss of a row needs only its own similarities, so the similarities of a chunk are freed after its gradient.
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
        to_scale = (to_queries * q).sum(dtype=torch.float64)  # sum of cosine times derivative
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
    """Return the cross-entropy against all answers, averaged over the positives of each query, then over queries.

    The target distribution is uniform over a query's positives, so the loss of a perfect model is the mean logarithm
    of their number.

    Args:
        queries: features of unit norm.
        answers: features of unit norm.
        positives: which answers are positives of each query. Every query needs at least one.
        scale: inverse temperature, a factor on the cosines.

    Source: SupCon (arXiv 2004.11362), equation 2.
    """
    with torch.autocast(queries.device.type, enabled=False):
        target = positives / positives.sum(dim=1, keepdim=True)
        return F.cross_entropy(scale * queries @ answers.T, target)
