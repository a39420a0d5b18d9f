"""Contrastive losses between images and texts."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor


def contrastive_loss(
    image: Float[Tensor, "b d"],
    text: Float[Tensor, "b d"],
    all_image: Float[Tensor, "n d"],
    all_text: Float[Tensor, "n d"],
    scale: Float[Tensor, ""],
    first_row: int,
    label_smoothing: float = 0.0,
) -> Float[Tensor, ""]:
    """Symmetric cross-entropy of this rank's rows against the joined batch.

    Features are L2-normalized; `scale` multiplies cosines (1 / temperature). Row i of this rank is row `first_row + i`
    of the joined batch, and that is its only positive. Each rank scores b x n similarities, not n x n, and the mean
    over ranks is the loss of the joined batch.

    Source: CLIP (arXiv 2103.00020), figure 3; the rank-local form is the one used by large-batch CLIP trainers.
    """
    targets = torch.arange(len(image), device=image.device) + first_row
    # Mixed precision stops here: at scale 100 the nearest two bf16 logits lie half a unit apart.
    with torch.autocast(image.device.type, enabled=False):
        image_to_text = F.cross_entropy(scale * image @ all_text.T, targets, label_smoothing=label_smoothing)
        text_to_image = F.cross_entropy(scale * text @ all_image.T, targets, label_smoothing=label_smoothing)
    return (image_to_text + text_to_image) / 2


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
