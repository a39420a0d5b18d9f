"""How far a trained tower has moved from the frozen original; zero where it has not."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def feature_drift(features: Float[Tensor, "b d"], original: Float[Tensor, "b d"]) -> Float[Tensor, ""]:
    """1 - cosine between each feature and what it was, rows of unit norm, averaged."""
    return 1 - (features * original).sum(dim=1).mean()


def similarity_drift(
    features: Float[Tensor, "b d"],
    original: Float[Tensor, "b d"],
    texts: Float[Tensor, "n d"],
    scale: Float[Tensor, ""],
) -> Float[Tensor, ""]:
    """KL(before || after) of how each image spreads over the texts: softmax of scaled cosines, averaged over images.

    Features may move where no text looks; what the text tower reads from an image has to stay.

    Source: learning without forgetting (arXiv 1606.09282), equation 2, with the texts of a batch as classes; the
    divergence differs from its cross-entropy by what does not train.
    """
    # Mixed precision stops here: at scale 100 the nearest two bf16 logits lie half a unit apart.
    with torch.autocast(features.device.type, enabled=False):
        before = (scale * original @ texts.T).log_softmax(dim=1)
        after = (scale * features @ texts.T).log_softmax(dim=1)
    return F.kl_div(after, before, log_target=True, reduction="batchmean")
