"""Denoise: trains a latent diffusion model on captioned images."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any, Unpack

import torch
from jaxtyping import Float, Int
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from clipfix.data.needs import Needs
from clipfix.data.texts import by_sample
from clipfix.functional.denoising import denoising_loss
from clipfix.methods.base import Method
from clipfix.models.clip import Backbone
from clipfix.models.diffusion import Diffusion
from clipfix.training.phases import Training


class Denoise(Method):
    """The U-Net and its text encoder are trained together to denoise; the backbone is frozen.

    The tiny generator of this package was trained in this way. Feedback is only useful if the generator depends on its
    condition. Validation therefore logs the error under the image's own text, no text, and another image's text:
    `val/t500_right`, `val/t500_null`, `val/t500_shuffled`.

    Args:
        diffusion: the model to train.
        fit_autoencoder: fit the model's `PatchPCA` autoencoder to the first batch.
        text_dropout: fraction of the texts that are replaced by the empty text.
        compiled: compile the blocks of the U-Net with torch.compile.
        check_timesteps: timesteps at which validation compares texts.

    Source: latent diffusion, arXiv 2112.10752, equation 3. Text dropout, for guidance: arXiv 2207.12598, section 3.2.
    """

    no_prompt: Tensor

    def __init__(
        self,
        backbone: Backbone,
        diffusion: Diffusion,
        fit_autoencoder: bool,
        text_dropout: float,
        compiled: bool,
        check_timesteps: list[int],
        **training: Unpack[Training],
    ):
        super().__init__(backbone, **training)
        self.diffusion = diffusion
        self.fit_autoencoder = fit_autoencoder
        self.text_dropout = text_dropout
        self.check_timesteps = check_timesteps
        size = diffusion.image_size
        latents = None if fit_autoencoder else partial(diffusion.latents_of, size)
        self.needs = Needs(size, ("caption",), (Prompts(diffusion.tokenize),), latents=latents)
        self.register_buffer("no_prompt", diffusion.tokenize([""]), persistent=False)
        backbone.requires_grad_(False)
        diffusion.unet.requires_grad_(True)
        diffusion.text_encoder.requires_grad_(True)
        if compiled:
            diffusion.compile_blocks()

    def trained_names(self) -> set[str]:
        """Add a fitted autoencoder to the trained weights, although it has no gradient."""
        fitted = {f"diffusion.vae.{name}" for name, _ in self.diffusion.vae.named_parameters()}
        return super().trained_names() | (fitted if self.fit_autoencoder else set())

    def start(self, batches: Iterable[dict[str, Any]]) -> None:
        if self.fit_autoencoder:
            images = self.ranks.gather(next(iter(batches))["image"])
            self.diffusion.vae.fit(2 * images - 1)

    def loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        latents = batch["latents"] if "latents" in batch else self.diffusion.encode(batch["image"])
        dropped = self.ranks.sample(torch.rand, rows=len(latents)) < self.text_dropout
        prompts = torch.where(dropped[:, None], self.no_prompt, self.prompts(batch))
        noise = self.ranks.sample(torch.randn, rows=len(latents), shape=latents.shape[1:])
        timesteps = self.ranks.sample(torch.randint, 0, self.diffusion.num_timesteps, rows=len(latents))
        # On a CPU, the backward pass of fused attention in bf16 is many times slower than that of the plain one.
        with sdpa_kernel(SDPBackend.MATH) if self.device.type == "cpu" else nullcontext():
            return {"denoising": self.error(latents, noise, timesteps, self.diffusion.encode_text(prompts))}

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.seed_draws(batch_idx)
        latents = self.diffusion.encode(batch["image"])
        noise = self.ranks.sample(torch.randn, rows=len(latents), shape=latents.shape[1:])
        right = self.diffusion.encode_text(self.prompts(batch))
        null = self.diffusion.condition([""]).expand_as(right)
        conditions = {"right": right, "null": null, "shuffled": right.roll(1, dims=0)}
        for timestep in self.check_timesteps:
            timesteps = torch.full((len(latents),), timestep, device=self.device)
            for name, condition in conditions.items():
                error = self.error(latents, noise, timesteps, condition)
                self.log(f"val/t{timestep}_{name}", error, batch_size=self.batch_weight(batch), sync_dist=True)

    def prompts(self, batch: dict[str, Any]) -> Int[Tensor, "b t"]:
        """Return token ids for the generator's text encoder, from the loader or else from the strings of the batch."""
        source = batch if "prompt" in batch else Prompts(self.diffusion.tokenize)(batch)
        return source["prompt"].to(self.device)

    def error(
        self,
        latents: Float[Tensor, "b c h w"],
        noise: Float[Tensor, "b c h w"],
        timesteps: Int[Tensor, " b"],
        condition: Float[Tensor, "b t d"],
    ) -> Float[Tensor, ""]:
        """Return the mean squared error of the generator's prediction for noisy latents under a condition."""
        noisy = self.diffusion.add_noise(latents, noise, timesteps)
        predicted = self.diffusion.predict(noisy, timesteps, condition)
        return denoising_loss(predicted, self.diffusion.target(latents, noise, timesteps))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Also write the generator to the folder `diffusion` beside the checkpoint, for `diffusion.path`."""
        super().on_save_checkpoint(checkpoint)
        callback = self.trainer.checkpoint_callback
        assert isinstance(callback, ModelCheckpoint)
        if self.trainer.is_global_zero:
            trained = {name.removeprefix("diffusion."): weight for name, weight in checkpoint["state_dict"].items()}
            self.diffusion.save_pretrained(f"{callback.dirpath}/diffusion", torch.float16, trained)


class Prompts:
    """Adds `batch["prompt"]`, the token ids of all captions of an image as one text. For `Needs.encode`."""

    def __init__(self, tokenize: Callable[[list[str]], Tensor]) -> None:
        self.tokenize = tokenize

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        return {"prompt": self.tokenize(join_captions(batch))}


def join_captions(batch: Mapping[str, Any]) -> list[str]:
    """Return the captions of each image as one text, because each of them mentions other details."""
    return [". ".join(texts) for texts in by_sample(batch, "caption")]
