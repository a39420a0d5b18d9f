"""The autoencoder of the tiny generator: principal components of patches."""

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from jaxtyping import Float
from torch import Tensor, nn


class PatchPCA(ModelMixin, ConfigMixin):
    """An autoencoder without training: the principal components of square patches, each scaled by its variance.

    Drawn scenes have few colours and hard edges, so a dozen components of a 4x4 patch keep nearly all of the variance,
    and a closed form replaces hours of training. Its verbs and outputs are `AutoencoderKL`'s.
    """

    @register_to_config
    def __init__(self, patch_size: int, latent_channels: int, whitening: float, scaling_factor: float = 1.0) -> None:
        super().__init__()
        self.encoder = nn.Conv2d(3, latent_channels, patch_size, stride=patch_size)
        self.decoder = nn.ConvTranspose2d(latent_channels, 3, patch_size, stride=patch_size)

    @torch.no_grad()
    def fit(self, images: Float[Tensor, "b 3 h w"]) -> None:
        """Set both convolutions from images in [-1, 1]: z_i = u_i . (x - colour mean) / s_i.

        s_i^2 is proportional to variance_i^whitening (1: every component alike, 0: their natural proportions), and the
        latents' mean variance is 1, the scale that noise schedules are made for.
        """
        config: Any = self.config
        size, kept = config.patch_size, config.latent_channels
        patches = F.unfold(images.double(), size, stride=size).movedim(1, 2).flatten(0, 1)
        variance, axes = torch.linalg.eigh(torch.cov(patches.T, correction=0))
        variance, axes = variance.flip(0)[:kept], axes.flip(1)[:, :kept]
        scale = variance ** (config.whitening / 2)
        scale = scale * (variance / scale**2).mean().sqrt()
        colour = images.double().mean((0, 2, 3))
        encode = (axes / scale).T.unflatten(1, (3, size, size))
        decode = (axes * scale).T.unflatten(1, (3, size, size))
        self.encoder.load_state_dict({"weight": encode, "bias": -torch.einsum("kcyx,c->k", encode, colour)})
        self.decoder.load_state_dict({"weight": decode, "bias": colour})

    def encode(self, images: Float[Tensor, "b 3 h w"]) -> AutoencoderKLOutput:
        """Latents as a distribution without spread (log-variance -30), so that its mean, mode and samples agree."""
        mean = self.encoder(images)
        spread = torch.full_like(mean, -30)
        return AutoencoderKLOutput(latent_dist=DiagonalGaussianDistribution(torch.cat([mean, spread], 1)))

    def decode(self, latents: Float[Tensor, "b c h w"]) -> DecoderOutput:
        """Images in [-1, 1]."""
        return DecoderOutput(sample=self.decoder(latents))
