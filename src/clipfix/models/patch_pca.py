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
    """An autoencoder in closed form: the principal components of square patches, each scaled by its variance.

    Drawn scenes have few colours and hard edges, so a dozen components of a 4x4 patch retain nearly all variance, and
    no training is needed. It has the interface of `AutoencoderKL`.

    Args:
        patch_size: side of a patch, in pixels.
        latent_channels: number of components.
        whitening: 1 gives all components the same variance, 0 leaves their natural proportions.
        scaling_factor: factor on latents, as in `AutoencoderKL`.
    """

    @register_to_config
    def __init__(self, patch_size: int, latent_channels: int, whitening: float, scaling_factor: float = 1.0) -> None:
        super().__init__()
        self.encoder = nn.Conv2d(3, latent_channels, patch_size, stride=patch_size)
        self.decoder = nn.ConvTranspose2d(latent_channels, 3, patch_size, stride=patch_size)

    @torch.no_grad()
    def fit(self, images: Float[Tensor, "b 3 h w"]) -> None:
        """Set both convolutions from images in [-1, 1]: z_i = u_i . (x - colour mean) / s_i.

        s_i^2 is proportional to variance_i^whitening, and the mean variance of the latents is 1, as noise schedules
        expect.
        """
        config: Any = self.config
        size, components = config.patch_size, config.latent_channels
        patches = F.unfold(images.double(), size, stride=size).movedim(1, 2).flatten(0, 1)
        variance, axes = torch.linalg.eigh(torch.cov(patches.T, correction=0))
        variance, axes = variance.flip(0)[:components], axes.flip(1)[:, :components]
        scale = variance ** (config.whitening / 2)
        scale = scale * (variance / scale**2).mean().sqrt()
        colour = images.double().mean((0, 2, 3))
        encode = (axes / scale).T.unflatten(1, (3, size, size))
        decode = (axes * scale).T.unflatten(1, (3, size, size))
        self.encoder.load_state_dict({"weight": encode, "bias": -torch.einsum("kcyx,c->k", encode, colour)})
        self.decoder.load_state_dict({"weight": decode, "bias": colour})

    def encode(self, images: Float[Tensor, "b 3 h w"]) -> AutoencoderKLOutput:
        """Return latents of images in [-1, 1], as a distribution of almost no variance (its logarithm is -30)."""
        mean = self.encoder(images)
        log_variance = torch.full_like(mean, -30)
        return AutoencoderKLOutput(latent_dist=DiagonalGaussianDistribution(torch.cat([mean, log_variance], 1)))

    def decode(self, latents: Float[Tensor, "b c h w"]) -> DecoderOutput:
        """Return images in [-1, 1]."""
        return DecoderOutput(sample=self.decoder(latents))
