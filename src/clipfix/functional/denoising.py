"""Losses of latent diffusion models, and the distribution of timesteps at which they are computed."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


def denoising_loss(
    predicted: Float[Tensor, "b c h w"],
    target: Float[Tensor, "b c h w"],
) -> Float[Tensor, ""]:
    """Return the mean squared error of the prediction, in fp32.

    A row is one draw of noise and timestep for one image; all rows have the same weight.

    Source: DIVA (arXiv 2407.20171), equation 2.
    Departs: the reference calls backward once inside its loop over two draws and once after it, there without dividing
    by the accumulation steps, so that the two draws have weights of 5:1.
    """
    return F.mse_loss(predicted.float(), target.float())


def contrastive_denoising_loss(
    anchor: Float[Tensor, "b c h w"],
    positives: Float[Tensor, "b p c h w"],
    negatives: Float[Tensor, "b k c h w"],
    temperature: float,
) -> Float[Tensor, ""]:
    """Return the contrastive loss between the prediction of each image and p positives and k negatives, in fp32.

    It is -log softmax, over positives and negatives, of the anchor's cosine to each positive divided by `temperature`,
    averaged over rows and positives. If an anchor is equally near to all positives and far from all negatives, its loss
    is log p.

    Args:
        anchor: prediction under the image's own condition.
        positives: predictions or targets that it should be near to.
        negatives: predictions that it should be far from.
        temperature: divisor of the cosines.

    Source: DCR (arXiv 2603.04803), from its abstract and the authors' code; the equation of the paper was not
    available. The sum over positives outside of the logarithm follows SupCon (arXiv 2004.11362), equation 2.
    """
    # Without mixed precision: neighbouring bf16 cosines, divided by a temperature of 0.1, differ by 0.04.
    with torch.autocast(anchor.device.type, enabled=False):
        query = F.normalize(anchor.float().flatten(1), dim=-1)
        keys = F.normalize(torch.cat([positives, negatives], dim=1).float().flatten(2), dim=-1)
        likelihoods = (torch.einsum("bd,bkd->bk", query, keys) / temperature).log_softmax(dim=1)
    return -likelihoods[:, : positives.shape[1]].mean()


def logit_normal_timesteps(
    normal: Float[Tensor, "*shape"], mean: float, sd: float, low: int, high: int
) -> Int[Tensor, "*shape"]:
    """Return timesteps in [low, high), distributed as the sigmoid of a normal variable. The middle is most likely.

    Args:
        normal: standard normal draws.
        mean: mean of the normal variable; above 0, timesteps have more noise.
        sd: its standard deviation; the smaller it is, the closer the timesteps are to each other.
        low: first timestep.
        high: the timestep after the last.

    Source: Stable Diffusion 3 (arXiv 2403.03206), section 3.1; GenHancer (arXiv 2503.19480), mean 0 and sd 1.
    Departs: both draw the time of a rectified flow, which is its fraction of noise. Here the draw is a fraction of the
    diffusion model's timesteps.
    """
    fraction = (mean + sd * normal).sigmoid()
    return (low + fraction * (high - low)).long().clamp(max=high - 1)  # the sigmoid rounds to 1 for large draws
