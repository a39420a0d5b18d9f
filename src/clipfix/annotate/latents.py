"""Latents of a generator's autoencoder, stored in the shards; `data.latents` reads them in training."""

import io
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from clipfix.annotate import Annotator, Raw, Sample
from clipfix.data.decoding import fingerprint, square
from clipfix.models.clip import Backbone
from clipfix.models.diffusion import Diffusion

MEMBER = "latent.npz"


class Latents(Annotator):
    """Write `latent.npz` of each sample: `latent` [c, y, x] in fp16; training checks it by `of` and `picture`.

    `Diffusion.encode` computes it in `diffusion.dtype`, from the same picture as in DIVA's training batch: `square`
    resizes and crops without randomness to the larger of the backbone's and the generator's size.
    """

    def __init__(self, output: str, batch_size: int, diffusion: Diffusion, backbone: Backbone) -> None:
        super().__init__(output, batch_size)
        size = max(backbone.image_size, diffusion.image_size)  # as DIVA does; the backbone is needed for nothing else
        del diffusion.unet, diffusion.text_encoder
        self.diffusion, self.of = diffusion, diffusion.latents_of(size)
        self.prepare = partial(read, size)

    def annotate(self, raws: list[Raw], inputs: Float[Tensor, "b 3 h w"]) -> list[dict[str, bytes]]:
        members = []
        for raw, latent in zip(raws, self.diffusion.encode(inputs).half().cpu().numpy(), strict=True):
            names: dict[str, Any] = {"of": np.array(self.of), "picture": np.array(fingerprint(raw))}
            np.savez(file := io.BytesIO(), latent=latent, **names)
            members.append({MEMBER: file.getvalue()})
        return members


def read(size: int, samples: list[Sample]) -> Float[Tensor, "b 3 h w"]:
    """Return pictures as `ShardData` gives them to a method with this image size."""
    return torch.stack([square(sample["image"], size) for sample in samples])
