"""The denoising loss of latent diffusion models."""

import torch.nn.functional as F
from jaxtyping import Float
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
