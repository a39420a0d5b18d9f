"""Classifiers from a few labelled images: the logits and the searches of Tip-Adapter and APE.

Names in this file: C classes, K labelled images (shots) of each, N = C K cached images, D width of the features. Image
features f [B, D], keys (features of the cached images) F [N, D] and text features W [C, D] have unit norm.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

SCALE = 100.0  # factor on the cosines of the zero-shot logits; a constant in the authors' code, not the model's scale


# -- logits ------------------------------------------------------------------------------------------------------------


def zeroshot_logits(features: Float[Tensor, "b d"], text: Float[Tensor, "c d"]) -> Float[Tensor, "b c"]:
    """Return the zero-shot logits 100 f W^T."""
    return SCALE * features @ text.T


def affinity(
    features: Float[Tensor, "b q"], keys: Float[Tensor, "n q"], beta: float | Float[Tensor, ""]
) -> Float[Tensor, "b n"]:
    """Return the similarity exp(-beta (1 - f F^T)) of each image to each cached one.

    Source: Tip-Adapter (arXiv 2111.03930), equation 4.
    """
    return (beta * (features @ keys.T - 1)).exp()


def tip_logits(
    features: Float[Tensor, "b d"],
    text: Float[Tensor, "c d"],
    keys: Float[Tensor, "n d"],
    values: Float[Tensor, "n c"],
    alpha: float,
    beta: float,
) -> Float[Tensor, "b c"]:
    """Return the logits of Tip-Adapter: zero-shot plus alpha times the labels of similar cached images.

    Args:
        features: image features.
        text: text feature of each class.
        keys: features of the cached images.
        values: one-hot labels of the cached images, or other weights [n, c].
        alpha: weight of the cache.
        beta: sharpness of the similarity.

    Source: Tip-Adapter (arXiv 2111.03930), equation 6.
    """
    return zeroshot_logits(features, text) + alpha * affinity(features, keys, beta) @ values


def label_divergence(
    keys: Float[Tensor, "n q"], text: Float[Tensor, "c q"], values: Float[Tensor, "n c"]
) -> Float[Tensor, " n"]:
    """Return, in bits, how far the texts' prediction for each cached image is from its label.

    It is the Kullback-Leibler divergence of softmax(F W^T), without a temperature, from the one-hot label; 1e-6 is
    added to both. Its value is close to log2(C) for all images, a little more where the texts are wrong.

    Source: APE (arXiv 2304.01195), equation 9, and the authors' code.
    """
    predicted, tiny = (keys @ text.T).softmax(dim=1), 1e-6
    return (values * ((values + tiny) / (predicted + tiny)).log2()).sum(dim=1)


def ape_logits(
    features: Float[Tensor, "b d"],
    text: Float[Tensor, "c d"],
    keys: Float[Tensor, "n d"],
    values: Float[Tensor, "n c"],
    channels: Int[Tensor, " q"],
    alpha: float,
    beta: float,
    gamma: float,
) -> Float[Tensor, "b c"]:
    """Return the logits of training-free APE.

    The zero-shot logits use all channels. The cache uses the chosen ones, normalized again, and each cached image has
    the weight exp(gamma d), where d is its `label_divergence`. With gamma = 0 and all channels it is Tip-Adapter.

    Source: APE (arXiv 2304.01195), equations 7 to 10.
    """
    refined = Refined.of(features, text, keys, values, channels)
    weights = (gamma * refined.divergence).exp()[:, None] * values
    return zeroshot_logits(features, text) + alpha * affinity(refined.features, refined.keys, beta) @ weights


class Refined(NamedTuple):
    """Features cut to chosen channels and normalized again, and the divergence of each cached image from its label."""

    features: Float[Tensor, "b q"]
    keys: Float[Tensor, "n q"]
    divergence: Float[Tensor, " n"]

    @classmethod
    def of(
        cls,
        features: Float[Tensor, "b d"],
        text: Float[Tensor, "c d"],
        keys: Float[Tensor, "n d"],
        values: Float[Tensor, "n c"],
        channels: Int[Tensor, " q"],
    ) -> "Refined":
        """Cut image features, text features and keys to `channels`."""
        cut_features, cut_text, cut_keys = (F.normalize(part[:, channels], dim=1) for part in (features, text, keys))
        return cls(cut_features, cut_keys, label_divergence(cut_keys, cut_text, values))


def ape_t_logits(
    features: Float[Tensor, "b d"],
    text: Float[Tensor, "c d"],
    keys: Float[Tensor, "n d"],
    labels: Int[Tensor, " n"],
    channels: Int[Tensor, " q"],
    residuals: Float[Tensor, "c q"],
    weights: Float[Tensor, "n 1"],
    alpha: float,
    beta: float,
) -> Float[Tensor, "b c"]:
    """Return the logits of APE-T.

    The residuals of a class are added to the chosen channels of its text and of all its cached images. Nothing is
    normalized again, and both terms use all channels. With residuals of zero and weights of one it is Tip-Adapter.

    Args:
        features: image features.
        text: text feature of each class.
        keys: features of the cached images.
        labels: class of each cached image.
        channels: the chosen channels.
        residuals: trained; added to the chosen channels.
        weights: trained; weight of each cached image.
        alpha: weight of the cache.
        beta: sharpness of the similarity.

    Source: APE (arXiv 2304.01195), section 3.4, and the authors' code.
    """
    text = text.index_add(1, channels, residuals)
    keys = keys.index_add(1, channels, residuals[labels])
    values = weights * F.one_hot(labels, len(text)).to(weights.dtype)
    return tip_logits(features, text, keys, values, alpha, beta)


# -- channels ----------------------------------------------------------------------------------------------------------


def interclass_similarity(items: Float[Tensor, "c m d"]) -> Float[Tensor, " d"]:
    """Return, by channel, the mean product of items of different classes.

    S_k = sum over classes i != j and their items m, n of x_imk x_jnk / (C (C - 1) M^2). With the class sums t_i it is
    ((sum_i t_ik)^2 - sum_i t_ik^2) / (C (C - 1) M^2), which costs O(C M D) instead of O(C^2 M^2 D).

    Args:
        items: M items of each class: its text and its keys, or its text alone.

    Source: APE (arXiv 2304.01195), equation 3; the closed form is ours.
    """
    classes, count, _ = items.shape
    sums = items.sum(dim=1)
    return (sums.sum(dim=0).square() - sums.square().sum(dim=0)) / (classes * (classes - 1) * count**2)


def channel_criterion(
    text: Float[Tensor, "c d"], keys: Float[Tensor, "c k d"] | None, similarity: float, variance: float
) -> Float[Tensor, " d"]:
    """Return a value for each channel; the channels with the largest values are chosen.

    It is -w0 S_k + w1 V_k: channels in which classes are dissimilar and whose text features vary over classes.

    Args:
        text: text feature of each class.
        keys: features of the K cached images of each class, for training-free APE; None for APE-T.
        similarity: weight w0 of the interclass similarity.
        variance: weight w1 of the variance.

    Source: APE (arXiv 2304.01195), equation 5.
    """
    items = text[:, None] if keys is None else torch.cat([text[:, None], keys], dim=1)
    return variance * text.var(dim=0) - similarity * interclass_similarity(items)


# -- search ------------------------------------------------------------------------------------------------------------


class Grid(NamedTuple):
    """Values to try of each number. A grid of n values from `low` to `high` leaves `high` out."""

    alpha: Float[Tensor, " a"]
    beta: Float[Tensor, " b"]
    gamma: Float[Tensor, " g"]

    @classmethod
    def of(cls, scale: tuple[float, float, float], steps: tuple[int, int, int]) -> "Grid":
        """Return the grid of the authors' code: alpha and beta from 0.1, gamma from 0.

        Args:
            scale: upper ends for beta, alpha and gamma, in this order.
            steps: number of values of beta, alpha and gamma.
        """

        def values(low: float, high: float, count: int) -> Tensor:
            return low + torch.arange(count, dtype=torch.float64) * (high - low) / count

        (high_beta, high_alpha, high_gamma), (count_beta, count_alpha, count_gamma) = scale, steps
        return cls(
            values(0.1, high_alpha, count_alpha),
            values(0.1, high_beta, count_beta),
            values(0.0, high_gamma, count_gamma),
        )


class Found(NamedTuple):
    """The best point of a search, and the number of right answers at each point."""

    alpha: float
    beta: float
    gamma: float
    accuracy: float  # percent
    correct: Int[Tensor, "b a g"]


def search(
    zeroshot: Float[Tensor, "v c"],
    cosines: Float[Tensor, "v n"],
    divergence: Float[Tensor, " n"],
    values: Float[Tensor, "n c"],
    labels: Int[Tensor, " v"],
    grid: Grid,
    max_entries: int = 2**26,
) -> Found:
    """Return the alpha, beta and gamma with the highest accuracy on labelled validation images.

    Of points with equal accuracy the first wins, in the order beta, alpha, gamma, of which gamma varies fastest. The
    affinity depends on beta alone and the weights of the cached images on gamma alone, so each pair of them costs one
    matrix product, and alpha costs a scaled sum.

    Args:
        zeroshot: zero-shot logits of the validation images.
        cosines: cosines of their features and the keys.
        divergence: `label_divergence` of each cached image; zeros for Tip-Adapter.
        values: one-hot labels of the cached images.
        labels: class of each validation image.
        grid: the values to try.
        max_entries: entries of the largest temporary tensor; more validation images are processed in parts.

    Source: the authors' code of APE (arXiv 2304.01195), whose loops compute all logits anew at each point.
    """
    alpha = grid.alpha.to(zeroshot)
    correct = torch.zeros(len(grid.beta), len(grid.alpha), len(grid.gamma), dtype=torch.int64, device=zeroshot.device)
    classes, images = values.shape[1], len(zeroshot)
    rows = max(1, min(images, max_entries // max(len(alpha) * classes, len(divergence))))
    for part in _parts(images, rows):
        for g, gamma in enumerate(grid.gamma.tolist()):
            weights = (gamma * divergence).exp()[:, None] * values
            for b, beta in enumerate(grid.beta.tolist()):
                cached = (beta * (cosines[part] - 1)).exp() @ weights
                predicted = (zeroshot[part] + alpha[:, None, None] * cached).argmax(dim=-1)
                correct[b, :, g] += (predicted == labels[part]).sum(dim=1)
    best = int(correct.flatten().argmax())  # of equal ones the first
    b, a, g = (int(place) for place in torch.unravel_index(torch.tensor(best), correct.shape))
    accuracy = 100 * int(correct[b, a, g]) / images
    return Found(grid.alpha[a].item(), grid.beta[b].item(), grid.gamma[g].item(), accuracy, correct)


def _parts(count: int, size: int) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, count, size))
