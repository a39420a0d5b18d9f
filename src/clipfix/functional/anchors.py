"""Distances between the features of a trained tower and those of the frozen, pretrained one."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def feature_drift(features: Float[Tensor, "b d"], original: Float[Tensor, "b d"]) -> Float[Tensor, ""]:
    """Return the mean of 1 - cosine between each feature and its original; it is 0 where no feature has moved.

    Args:
        features: image features of the trained tower, of unit norm.
        original: features of the same images from the pretrained tower, of unit norm.
    """
    return 1 - (features * original).sum(dim=1).mean()


def similarity_drift(
    features: Float[Tensor, "b d"],
    original: Float[Tensor, "b d"],
    texts: Float[Tensor, "n d"],
    scale: Float[Tensor, ""],
) -> Float[Tensor, ""]:
    """Return KL(original || trained) between each image's distributions over the texts, averaged over images.

    The distribution of an image is the softmax of its scaled cosines to the texts. Features may move in directions
    that no text has; the similarities to the texts must stay.

    Args:
        features: image features of the trained tower, of unit norm.
        original: features of the same images from the pretrained tower, of unit norm.
        texts: text features, of unit norm.
        scale: inverse temperature, a factor on the cosines.

    Source: learning without forgetting (arXiv 1606.09282), equation 2, with the texts of a batch as classes. The
    divergence differs from that cross-entropy by a term without a gradient.
    """
    # Without mixed precision: at scale 100 two neighbouring bf16 logits differ by half a unit.
    with torch.autocast(features.device.type, enabled=False):
        before = (scale * original @ texts.T).log_softmax(dim=1)
        after = (scale * features @ texts.T).log_softmax(dim=1)
    return F.kl_div(after, before, log_target=True, reduction="batchmean")
