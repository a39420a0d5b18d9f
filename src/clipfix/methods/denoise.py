"""Training a generator: the noise-prediction error of a latent diffusion model on captioned pictures."""

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
    """The U-Net and its text encoder learn together to denoise; the backbone rests. It made the tiny generator.

    Feedback is worth what the generator's condition is worth, so validation asks how much the right text lowers the
    error against no text, and another picture's text raises it: `val/t500_right`, `val/t500_null`, `val/t500_shuffled`.

    Source: latent diffusion, arXiv 2112.10752, equation 3; texts dropped for guidance, arXiv 2207.12598, section 3.2.
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
            diffusion.unet.compile(dynamic=False)

    def trained_names(self) -> set[str]:
        """A fitted autoencoder belongs into the checkpoint, though no gradient reaches it."""
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
        # On a CPU, fused attention takes many times as long as plain products in the backward pass of bf16.
        with sdpa_kernel(SDPBackend.MATH) if self.device.type == "cpu" else nullcontext():
            return {"denoising": self.error(latents, noise, timesteps, self.diffusion.encode_text(prompts))}

    @torch.compiler.set_stance("force_eager")  # compiling once more, without gradients, takes longer than these steps
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
                self.log(f"val/t{timestep}_{name}", error, batch_size=self.share(batch), sync_dist=True)

    def prompts(self, batch: dict[str, Any]) -> Int[Tensor, "b t"]:
        """Token ids for the generator's text encoder, as the loader made them, or of the strings of a batch without."""
        made = batch if "prompt" in batch else Prompts(self.diffusion.tokenize)(batch)
        return made["prompt"].to(self.device)

    def error(
        self,
        latents: Float[Tensor, "b c h w"],
        noise: Float[Tensor, "b c h w"],
        timesteps: Int[Tensor, " b"],
        condition: Float[Tensor, "b t d"],
    ) -> Float[Tensor, ""]:
        """Mean squared error of what the generator predicts for noisy latents under a condition."""
        noisy = self.diffusion.add_noise(latents, noise, timesteps)
        predicted = self.diffusion.predict(noisy, timesteps, condition)
        return denoising_loss(predicted, self.diffusion.target(latents, noise, timesteps))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Beside every checkpoint the generator itself, as the folder that `diffusion.path` takes."""
        super().on_save_checkpoint(checkpoint)
        callback = self.trainer.checkpoint_callback
        assert isinstance(callback, ModelCheckpoint)
        if self.trainer.is_global_zero:
            trained = {name.removeprefix("diffusion."): weight for name, weight in checkpoint["state_dict"].items()}
            self.diffusion.save_pretrained(f"{callback.dirpath}/diffusion", torch.float16, trained)


class Prompts:
    """Adds `batch["prompt"]`, the token ids of all captions of a picture as one text; for `Needs.encode`."""

    def __init__(self, tokenize: Callable[[list[str]], Tensor]) -> None:
        self.tokenize = tokenize

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        return {"prompt": self.tokenize(joined_texts(batch))}


def joined_texts(batch: Mapping[str, Any]) -> list[str]:
    """All texts of a picture as one: each captioner's caption says other details, together they say most."""
    return [". ".join(texts) for texts in by_sample(batch, "caption")]
