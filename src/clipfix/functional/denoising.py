"""The denoising loss of latent diffusion models, and at which noise levels it is asked."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


def denoising_loss(
    predicted: Float[Tensor, "b c h w"],
    target: Float[Tensor, "b c h w"],
) -> Float[Tensor, ""]:
    """Mean squared error of the prediction in fp32, every row (one draw of noise for one image) weighted alike.

    Source: DIVA (arXiv 2407.20171), equation 2, for one or several draws of noise and timestep an image.
    Departs: the reference calls backward once inside the loop over two draws and once after it, undivided by the
    accumulation steps, which weighs them 5:1.
    """
    return F.mse_loss(predicted.float(), target.float())


def contrastive_denoising_loss(
    anchor: Float[Tensor, "b c h w"],
    positives: Float[Tensor, "b p c h w"],
    negatives: Float[Tensor, "b k c h w"],
    temperature: float,
) -> Float[Tensor, ""]:
    """-log softmax, over positives and negatives, of the anchor's cosine / `temperature` to each positive, averaged.

    Each row flattened; in fp32, every row and positive weighted alike. Where the anchor is as near to all positives and
    far from all negatives, the loss is log p.

    Source: DCR (arXiv 2603.04803), from its abstract and its authors' code; the paper's own equation was not at hand.
    The sum over positives outside of the logarithm is SupCon's (arXiv 2004.11362), equation 2.
    """
    with torch.autocast(anchor.device.type, enabled=False):  # the nearest two bf16 cosines, over 0.1, lie 0.04 apart
        query = F.normalize(anchor.float().flatten(1), dim=-1)
        keys = F.normalize(torch.cat([positives, negatives], dim=1).float().flatten(2), dim=-1)
        likelihoods = (torch.einsum("bd,bkd->bk", query, keys) / temperature).log_softmax(dim=1)
    return -likelihoods[:, : positives.shape[1]].mean()


def logit_normal_timesteps(
    normal: Float[Tensor, "*shape"], mean: float, sd: float, low: int, high: int
) -> Int[Tensor, "*shape"]:
    """Timesteps in [low, high) whose place in between is the sigmoid of a normal variable: the middle comes most often.

    `normal` holds standard normal draws. A mean above 0 moves them to more noise, a smaller `sd` gathers them.

    Source: Stable Diffusion 3 (arXiv 2403.03206), section 3.1; GenHancer (arXiv 2503.19480), mean 0 and sd 1.
    Departs: both draw the time of a rectified flow, which is its share of noise; here it is the share of the timesteps
    that a diffusion model counts.
    """
    share = (mean + sd * normal).sigmoid()
    return (low + share * (high - low)).long().clamp(max=high - 1)  # far out the sigmoid is 1
