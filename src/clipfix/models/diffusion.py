"""Latent diffusion models: encode images to latents, add noise, and predict it under a condition.

A model is loaded from a folder in the layout of diffusers (unet/ vae/ text_encoder/ tokenizer/ scheduler/). Stable
Diffusion 1.x and 2.x work without additional code, from the hub or from disk. The tiny generator of this package is
such a folder too; its autoencoder is `PatchPCA`.
"""

import json
from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, UNet2DConditionModel
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from jaxtyping import Float, Int
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from transformers.utils import logging

from clipfix.models.patch_pca import PatchPCA
from clipfix.models.tokenizer import clip_tokenizer

logging.disable_progress_bar()  # the bar of a text encoder, which loads in a second, breaks the progress bar of the run
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Parts(NamedTuple):
    """The components of a latent diffusion model, as in the folders of diffusers."""

    unet: Any  # UNet2DConditionModel; for type checkers, models of diffusers are not modules
    vae: Any  # PatchPCA or AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    scheduler: Any  # DDPMScheduler


class Diffusion(nn.Module):
    """A frozen latent diffusion model. Gradients flow through it to its inputs, but not to its parameters.

    The text encoder is only needed to embed texts. If all texts are embedded in advance, save memory with
    `del diffusion.text_encoder`.

    Args:
        path: a folder in the layout of diffusers, or the name of a repository on the hub.
        revision: branch, tag or commit on the hub.
        dtype: dtype of the weights; `auto` is bf16 if the device supports it. Outputs are fp32.
        compiled: compile the blocks of the U-Net with torch.compile, for passes with gradients (`compile_blocks`).
        checkpointing: gradient checkpointing in the U-Net. Neither of the two changes values beyond rounding.

    Raises:
        ValueError: if the folder cannot be read, its components do not fit each other, or the U-Net needs more than a
            text as its condition.

    Source: latent diffusion, arXiv 2112.10752.
    """

    def __init__(
        self,
        path: str,
        revision: str | None = None,
        dtype: Literal["auto", "fp32", "bf16"] = "fp32",
        compiled: bool = False,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if dtype not in ("auto", *DTYPES):
            raise ValueError(f"diffusion.dtype is {dtype}: choose auto, {' or '.join(DTYPES)}.")
        if dtype == "auto":
            dtype = "bf16" if has_bf16() else "fp32"
        elif dtype == "bf16" and torch.cuda.is_available() and not has_bf16():
            raise ValueError(
                f"diffusion.dtype is bf16, which {torch.cuda.get_device_name()} does not support: set it to fp32."
            )
        weights: dict[str, Any] = {"use_safetensors": True, "torch_dtype": DTYPES[dtype], "low_cpu_mem_usage": False}
        try:
            folder = _folder(path, revision)
            configs = {part: json.loads((folder / part / file).read_text()) for part, file in CONFIG_FILES.items()}
            if not (folder / "tokenizer").is_dir():
                raise FileNotFoundError(f"there is no folder {folder / 'tokenizer'}")
            _check_fit(path, **configs)
            vae_class = VAES[configs["vae"]["_class_name"]]
            parts = Parts(
                UNet2DConditionModel.from_pretrained(folder, subfolder="unet", **weights),
                vae_class.from_pretrained(folder, subfolder="vae", **weights),
                CLIPTextModel.from_pretrained(folder, subfolder="text_encoder", **weights),
                CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer"),
                # A folder names a sampler, but training needs only the forward process, which is that of DDPM in all.
                DDPMScheduler.from_pretrained(folder, subfolder="scheduler"),
            )
        except (OSError, HFValidationError) as error:
            raise ValueError(
                f"Cannot load the diffusion model {path!r}: {str(error).splitlines()[0]}\nSet diffusion.path to a "
                "folder in the layout of diffusers (unet/ vae/ text_encoder/ tokenizer/ scheduler/)."
            ) from error
        self._set_parts(parts)
        if compiled:
            self.compile_blocks()
        if checkpointing:
            self.unet.enable_gradient_checkpointing()

    @classmethod
    def from_parts(cls, parts: "Parts") -> "Diffusion":
        """Return a model of components that are already in memory."""
        model = cls.__new__(cls)
        nn.Module.__init__(model)
        model._set_parts(parts)
        return model

    def compile_blocks(self) -> None:
        """Compile the residual and attention blocks of the U-Net with torch.compile, for passes with gradients.

        Blocks of one shape share one graph: 21 graphs for Stable Diffusion. They compile in less time than the whole
        U-Net as one graph (benchmarks/RESULTS.md).
        """
        import torch._dynamo.config as limits  # takes seconds

        limits.recompile_limit = max(limits.recompile_limit, 64)  # of one forward method; the default is 8 graphs
        self.compiled = True
        for block in self.unet.modules():
            if isinstance(block, ResnetBlock2D | Transformer2DModel):
                block.compile(dynamic=False)

    def _set_parts(self, parts: "Parts") -> None:
        self.compiled = False
        self.unet, self.vae, self.text_encoder, self.tokenizer, self.scheduler = parts
        self.requires_grad_(False).eval()
        self.prediction_type: str = self.scheduler.config.prediction_type
        self.num_timesteps: int = self.scheduler.config.num_train_timesteps
        self.condition_dim: int = self.unet.config.cross_attention_dim
        self.condition_tokens: int = self.tokenizer.model_max_length
        # A function without the model, so that the loader's workers can use a copy.
        self.tokenize = partial(_tokenize, self.tokenizer)
        # An AutoencoderKL halves the resolution between its blocks.
        patch = isinstance(self.vae, PatchPCA)
        shrink = self.vae.config.patch_size if patch else 2 ** (len(self.vae.config.block_out_channels) - 1)
        self.image_size: int = self.unet.config.sample_size * shrink

    def encode(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b c y x"]:
        """Return latents of images in [0, 1]: the mode of the autoencoder's posterior, which is not random.

        No graph is built, because neither the frozen autoencoder nor the images require a gradient.
        """
        if images.shape[-2:] != (self.image_size, self.image_size):
            images = F.interpolate(images, size=self.image_size, mode="bicubic", antialias=True).clamp(0, 1)
        posterior = self.vae.encode((2 * images - 1).to(self.vae.dtype)).latent_dist
        return posterior.mode().float() * self.vae.config.scaling_factor

    def latents_of(self, image_size: int) -> str:
        """Return a string that identifies latents: the autoencoder, its precision, and the size of its images.

        It is stored beside latents. Latents with another string are not used.

        Args:
            image_size: side of the images that `encode` gets, in pixels.
        """
        config: dict[str, Any] = dict(self.vae.config)
        defaults = config.get("_use_default_values", ())  # left out, because releases of diffusers differ in them
        settings = {key: value for key, value in config.items() if not key.startswith("_") and key not in defaults}
        settings["scaling_factor"] = self.vae.config.scaling_factor  # missing in the first folders of Stable Diffusion
        digest = blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=8)
        for name, tensor in sorted(self.vae.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
        precision = str(self.vae.dtype).removeprefix("torch.")
        autoencoder = f"{type(self.vae).__name__} {digest.hexdigest()} in {precision}"
        return f"{autoencoder}, {image_size} px pictures at {self.image_size} px"

    def decode(self, latents: Float[Tensor, "b c y x"]) -> Float[Tensor, "b 3 h w"]:
        """Return images in [0, 1] of latents."""
        images = self.vae.decode((latents / self.vae.config.scaling_factor).to(self.vae.dtype)).sample
        return (images.float() / 2 + 0.5).clamp(0, 1)

    def condition(self, texts: list[str]) -> Float[Tensor, "b t d"]:
        """Return the conditions of texts: the last hidden states of the text encoder. Those of "" are the null text."""
        return self.encode_text(self.tokenize(texts).to(self.text_encoder.device))

    def encode_text(self, tokens: Int[Tensor, "b t"]) -> Float[Tensor, "b t d"]:
        """Return the last hidden states of the text encoder for token ids, as returned by `tokenize`."""
        return self.text_encoder(tokens).last_hidden_state.float()

    def add_noise(
        self, latents: Float[Tensor, "b c y x"], noise: Float[Tensor, "b c y x"], timesteps: Int[Tensor, " b"]
    ) -> Float[Tensor, "b c y x"]:
        """Return noisy latents: sqrt(abar_t) latents + sqrt(1 - abar_t) noise."""
        return self.scheduler.add_noise(latents, noise, timesteps)

    def target(
        self, latents: Float[Tensor, "b c y x"], noise: Float[Tensor, "b c y x"], timesteps: Int[Tensor, " b"]
    ) -> Float[Tensor, "b c y x"]:
        """Return the target of `predict`: the noise, or v = sqrt(abar_t) noise - sqrt(1 - abar_t) latents.

        Source: v is equation 10 and appendix D of arXiv 2202.00512; Stable Diffusion 2.1 (not 2.1-base) predicts it.
        """
        if self.prediction_type == "v_prediction":
            return self.scheduler.get_velocity(latents, noise, timesteps)
        return noise

    def predict(
        self,
        noisy: Float[Tensor, "b c y x"],
        timesteps: Int[Tensor, " b"],
        condition: Float[Tensor, "b t d"],
    ) -> Float[Tensor, "b c y x"]:
        """Return the prediction of the U-Net, in fp32.

        Args:
            noisy: noisy latents.
            timesteps: timestep of each row.
            condition: what the U-Net attends to; any number of tokens.
        """
        dtype = self.unet.dtype
        # On a CPU, the backward pass of fused attention in bf16 is slower than that of the plain one. Checkpointing
        # recomputes activations outside of this context, so it cannot use it.
        plain = dtype == torch.bfloat16 and noisy.device.type == "cpu" and not self.unet.is_gradient_checkpointing
        # Weights in half precision need no autocast, which would cast to fp32 and back around each norm.
        casts = nullcontext() if dtype == torch.float32 else torch.autocast(noisy.device.type, enabled=False)
        eager = self.compiled and not torch.is_grad_enabled()  # each new batch size would be compiled again
        stance = torch.compiler.set_stance("force_eager") if eager else nullcontext()
        with sdpa_kernel(SDPBackend.MATH) if plain else nullcontext(), casts, stance:
            return self.unet(noisy.to(dtype), timesteps, encoder_hidden_states=condition.to(dtype)).sample.float()

    @torch.no_grad()
    def sample(
        self,
        condition: Float[Tensor, "b t d"],
        null: Float[Tensor, "n d"],
        steps: int,
        guidance: float,
        generator: torch.Generator,
    ) -> Float[Tensor, "b 3 h w"]:
        """Return images in [0, 1], sampled by DDIM.

        Args:
            condition: condition of each image; those of texts are returned by `condition`.
            null: condition of the empty text, from which classifier-free guidance leads away.
            steps: number of denoising steps.
            guidance: strength of the guidance; 1 for none.
            generator: draws the initial noise.

        Source: DDIM, arXiv 2010.02502; guidance, arXiv 2207.12598.
        """
        scheduler = DDIMScheduler.from_config(self.scheduler.config, clip_sample=False)  # latents are not bounded
        scheduler.set_timesteps(steps, device=self.unet.device)
        rows = len(condition)
        shape = (rows, self.unet.config.in_channels, self.unet.config.sample_size, self.unet.config.sample_size)
        latents = torch.randn(shape, generator=generator, device=generator.device).to(self.unet.device)
        for timestep in scheduler.timesteps:
            conditional, unconditional = (
                self.predict(latents, timestep.expand(rows), given) for given in (condition, null.expand(rows, -1, -1))
            )
            guided = unconditional + guidance * (conditional - unconditional)
            latents = scheduler.step(guided, timestep, latents).prev_sample
        return self.decode(latents)

    def save_pretrained(
        self, folder: str | Path, dtype: torch.dtype, weights: Mapping[str, Tensor] | None = None
    ) -> None:
        """Write a folder that the constructor reads, in `dtype`; `weights` replace those of the model by name."""
        parts = self.unet, self.vae, self.text_encoder, self.tokenizer, self.scheduler
        _write(folder, dtype, *parts, weights or {})


def _tokenize(tokenizer: CLIPTokenizer, texts: list[str]) -> Int[Tensor, "b t"]:
    """Return token ids of texts, cut or padded to the context length of the text encoder."""
    length = tokenizer.model_max_length
    return tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids


def has_bf16() -> bool:
    """Return whether the GPU, or the CPU if there is none, has bf16 in hardware. Emulated, it is slower than fp32."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if hasattr(torch.cpu, "get_capabilities"):
        return bool(torch.cpu.get_capabilities().get("avx512_bf16", False))
    return torch.cpu._is_avx512_bf16_supported()  # older releases of torch; docs/private-fields.md


# Components of a folder besides the tokenizer, each with its config file.
CONFIG_FILES = {
    "unet": "config.json",
    "vae": "config.json",
    "text_encoder": "config.json",
    "scheduler": "scheduler_config.json",
}
VAES: dict[str, type[PatchPCA] | type[AutoencoderKL]] = {"PatchPCA": PatchPCA, "AutoencoderKL": AutoencoderKL}


def _check_fit(
    path: str, unet: dict[str, Any], vae: dict[str, Any], text_encoder: dict[str, Any], scheduler: dict[str, Any]
) -> None:
    """Raise ValueError if components do not fit each other. Only configs are read, before any weights."""
    if vae["_class_name"] not in VAES:
        raise ValueError(
            f"diffusion.path is {path}, which has a {vae['_class_name']}: set it to a model with {' or '.join(VAES)}."
        )
    prediction_type = scheduler.get("prediction_type", "epsilon")
    if prediction_type not in ("epsilon", "v_prediction"):
        raise ValueError(
            f"diffusion.path is {path}, which predicts {prediction_type!r}: set it to a model that predicts epsilon or "
            "v_prediction."
        )
    if unet.get("addition_embed_type") is not None:  # SDXL
        raise ValueError(
            f"diffusion.path is {path}, which needs more than a text as its condition (addition_embed_type is "
            f"{unet['addition_embed_type']!r}): set it to a model like Stable Diffusion 1.x or 2.x."
        )
    if unet.get("class_embed_type") is not None:
        raise ValueError(
            f"diffusion.path is {path}, which needs more than a text as its condition (class_embed_type is "
            f"{unet['class_embed_type']!r}): set it to a model like Stable Diffusion 1.x or 2.x."
        )
    if not isinstance(unet["sample_size"], int):
        raise ValueError(
            f"diffusion.path is {path}, where sample_size in unet/config.json is {unet['sample_size']}: set that to "
            "one integer."
        )
    channels, width = vae["latent_channels"], text_encoder["hidden_size"]
    if not unet["in_channels"] == unet["out_channels"] == channels:  # inpainting, depth, upscaling
        raise ValueError(
            f"diffusion.path is {path}, whose U-Net has {unet['in_channels']} input and {unet['out_channels']} output "
            f"channels, and its autoencoder {channels}: set it to a text-to-image model, where all three are equal."
        )
    if unet["cross_attention_dim"] != width:
        raise ValueError(
            f"diffusion.path is {path}, whose U-Net attends to tokens of width {unet['cross_attention_dim']}, and its "
            f"text encoder gives {width}: copy the text encoder that the U-Net was trained with into the folder."
        )


def blank(
    folder: str, unet: dict[str, Any], vae: dict[str, Any], text_encoder: dict[str, Any], scheduler: dict[str, Any]
) -> Diffusion:
    """Write a generator with random weights to `folder`, load it and return it. Pretraining starts from it.

    Token embeddings start at zero, so that rows of words that training never reads compress well in a file.

    Args:
        folder: where it is written.
        unet: arguments of `UNet2DConditionModel`.
        vae: arguments of `PatchPCA`.
        text_encoder: arguments of `CLIPTextConfig`.
        scheduler: arguments of `DDPMScheduler`.
    """
    text_model = CLIPTextModel(CLIPTextConfig(**text_encoder))
    nn.init.zeros_(text_model.get_input_embeddings().weight)  # type: ignore[arg-type]
    tokenizer = clip_tokenizer(text_model.config.max_position_embeddings)
    parts = UNet2DConditionModel(**unet), PatchPCA(**vae), text_model, tokenizer, DDPMScheduler(**scheduler)
    _write(folder, torch.float32, *parts, weights={})
    return Diffusion(folder)


def _folder(path: str, revision: str | None) -> Path:
    """Return the local folder of a diffusers model; from the hub, only the files that are needed are downloaded."""
    if Path(path).is_dir():
        return Path(path)
    wanted = ["unet/*", "vae/*", "text_encoder/*", "tokenizer/*", "scheduler/*"]
    unwanted = ["*.bin", "*.msgpack", "*.fp16.*", "*.non_ema.*"]
    return Path(snapshot_download(path, revision=revision, allow_patterns=wanted, ignore_patterns=unwanted))


def _write(
    folder: str | Path,
    dtype: torch.dtype,
    unet: UNet2DConditionModel,
    vae: PatchPCA | AutoencoderKL,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    scheduler: DDPMScheduler,
    weights: Mapping[str, Tensor],
) -> None:
    def state(part: str, model: nn.Module) -> dict[str, Tensor]:
        current = model.state_dict()
        return {key: weights.get(f"{part}.{key}", tensor).to(dtype, copy=True) for key, tensor in current.items()}

    folder = Path(folder)
    models: dict[str, Any] = {"unet": unet, "vae": vae}
    for name, model in models.items():
        with torch.device("meta"):  # not a copy of the model, because sharded weights cannot be copied
            plain = type(model).from_config(model.config)
        plain.load_state_dict(state(name, model), assign=True)
        plain.save_pretrained(folder / name)
        config = json.loads((folder / name / "config.json").read_text())
        config.pop("_name_or_path", None)  # do not store the local path
        (folder / name / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    scheduler.save_pretrained(folder / "scheduler")  # type: ignore[attr-defined]
    # tokenizer.json repeats vocabulary and merges at twice the size, and transformers 4 does not need it.
    for name in tokenizer.save_pretrained(folder / "tokenizer"):
        if name.endswith("tokenizer.json"):
            Path(name).unlink()
    tokenizer.backend_tokenizer.model.save(str(folder / "tokenizer"))
    # transformers 5 writes keys without the prefix that folders of Stable Diffusion have and transformers 4 needs.
    prefix = "text_model."
    named = {prefix + key.removeprefix(prefix): tensor for key, tensor in state("text_encoder", text_encoder).items()}
    text_encoder.config.save_pretrained(folder / "text_encoder")
    save_file(named, folder / "text_encoder/model.safetensors", metadata={"format": "pt"})
