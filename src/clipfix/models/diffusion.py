"""A frozen latent diffusion model as "latents in, predicted noise out".

Everything is read from the folder that diffusers itself writes (unet/ vae/ text_encoder/ tokenizer/ scheduler/), so any
Stable Diffusion 1.x or 2.x, from the hub or from disk, gives feedback without a line of code. The tiny generator that
ships with this package is such a folder too; only its autoencoder, `PatchPCA`, is ours.
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

logging.disable_progress_bar()  # a bar for the second that a text encoder takes to load breaks the run's own
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Parts(NamedTuple):
    """What a latent diffusion model is made of, in the order of diffusers' folders."""

    unet: Any  # UNet2DConditionModel; diffusers hides from type checkers that its models are modules
    vae: Any  # PatchPCA or AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    scheduler: Any  # DDPMScheduler


class Diffusion(nn.Module):
    """A frozen latent diffusion model: its parameters get no gradient, what enters it does.

    The text encoder is only needed to embed texts: where those are known in advance, embed them and
    `del diffusion.text_encoder`.

    `dtype` is that of its weights, `auto` bf16 where the device has it; what comes out is fp32. `compiled` hands
    the U-Net's passes that need a gradient to torch.compile; the others, few and of other sizes, run as they are.
    `checkpointing` keeps the U-Net's activations at block borders alone and computes the rest a second time in the
    backward pass. Neither changes the values beyond rounding.

    A folder whose parts do not fit each other, or whose U-Net asks for more than a text, is a ValueError that says so.

    Source: latent diffusion, arXiv 2112.10752; the folder layout is diffusers' own.
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
            raise ValueError(f"{torch.cuda.get_device_name()} computes nothing in bf16: set diffusion.dtype=fp32.")
        weights: dict[str, Any] = {"use_safetensors": True, "torch_dtype": DTYPES[dtype], "low_cpu_mem_usage": False}
        try:
            folder = _folder(path, revision)
            configs = {part: json.loads((folder / part / file).read_text()) for part, file in CONFIG_FILES.items()}
            if not (folder / "tokenizer").is_dir():
                raise FileNotFoundError(f"no folder {folder / 'tokenizer'}")
            _check_fit(path, **configs)
            vae_class = VAES[configs["vae"]["_class_name"]]
            parts = Parts(
                UNet2DConditionModel.from_pretrained(folder, subfolder="unet", **weights),
                vae_class.from_pretrained(folder, subfolder="vae", **weights),
                CLIPTextModel.from_pretrained(folder, subfolder="text_encoder", **weights),
                CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer"),
                # Folders name a sampler; the forward process, all that training needs, is DDPM's in each.
                DDPMScheduler.from_pretrained(folder, subfolder="scheduler"),
            )
        except (OSError, HFValidationError) as error:
            raise ValueError(
                f"Cannot load the diffusion model {path!r}: {str(error).splitlines()[0]}\nGive a folder in diffusers' "
                "layout (unet/ vae/ text_encoder/ tokenizer/ scheduler/): diffusion.path=/folder"
            ) from error
        self._take(parts)
        if compiled:
            self.unet.compile(dynamic=False)
        if checkpointing:
            self.unet.enable_gradient_checkpointing()

    @classmethod
    def of(cls, parts: "Parts") -> "Diffusion":
        """Return a model of parts that are in memory already."""
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        made._take(parts)
        return made

    def _take(self, parts: "Parts") -> None:
        self.unet, self.vae, self.text_encoder, self.tokenizer, self.scheduler = parts
        self.requires_grad_(False).eval()
        self.prediction_type: str = self.scheduler.config.prediction_type
        self.num_timesteps: int = self.scheduler.config.num_train_timesteps
        self.condition_dim: int = self.unet.config.cross_attention_dim
        self.condition_tokens: int = self.tokenizer.model_max_length
        # Apart from the model, so that a loader's worker can hold it.
        self.tokenize = partial(_tokenize, self.tokenizer)
        # An AutoencoderKL halves the side between each two of its blocks.
        patch = isinstance(self.vae, PatchPCA)
        shrink = self.vae.config.patch_size if patch else 2 ** (len(self.vae.config.block_out_channels) - 1)
        self.image_size: int = self.unet.config.sample_size * shrink

    def encode(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b c y x"]:
        """Latents of images in [0, 1]: the mean of the autoencoder's posterior, so that a picture has one latent.

        No graph is built, as neither the frozen autoencoder nor the pixels of a batch ask for a gradient.
        """
        if images.shape[-2:] != (self.image_size, self.image_size):
            images = F.interpolate(images, size=self.image_size, mode="bicubic", antialias=True).clamp(0, 1)
        posterior = self.vae.encode((2 * images - 1).to(self.vae.dtype)).latent_dist
        return posterior.mode().float() * self.vae.config.scaling_factor

    def latents_of(self, image_size: int) -> str:
        """What `encode` depends on besides the picture: the autoencoder, its precision, and `image_size`, the side in
        pixels of the images it gets. Stored latents are recognised by it.
        """
        config: dict[str, Any] = dict(self.vae.config)
        by_default = config.get("_use_default_values", ())  # other releases of diffusers have other keys
        told = {key: value for key, value in config.items() if not key.startswith("_") and key not in by_default}
        told["scaling_factor"] = self.vae.config.scaling_factor  # Stable Diffusion's first folders leave it out
        digest = blake2b(json.dumps(told, sort_keys=True).encode(), digest_size=8)
        for name, tensor in sorted(self.vae.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
        precision = str(self.vae.dtype).removeprefix("torch.")
        autoencoder = f"{type(self.vae).__name__} {digest.hexdigest()} in {precision}"
        return f"{autoencoder}, {image_size} px pictures at {self.image_size} px"

    def decode(self, latents: Float[Tensor, "b c y x"]) -> Float[Tensor, "b 3 h w"]:
        """Images in [0, 1] of latents."""
        images = self.vae.decode((latents / self.vae.config.scaling_factor).to(self.vae.dtype)).sample
        return (images.float() / 2 + 0.5).clamp(0, 1)

    def condition(self, texts: list[str]) -> Float[Tensor, "b t d"]:
        """What the U-Net attends to: the text encoder's last hidden states; those of "" are the null text."""
        return self.encode_text(self.tokenize(texts).to(self.text_encoder.device))

    def encode_text(self, tokens: Int[Tensor, "b t"]) -> Float[Tensor, "b t d"]:
        """Return the text encoder's last hidden states of token ids, as `tokenize` makes them."""
        return self.text_encoder(tokens).last_hidden_state.float()

    def add_noise(
        self, latents: Float[Tensor, "b c y x"], noise: Float[Tensor, "b c y x"], timesteps: Int[Tensor, " b"]
    ) -> Float[Tensor, "b c y x"]:
        """sqrt(abar_t) latents + sqrt(1 - abar_t) noise."""
        return self.scheduler.add_noise(latents, noise, timesteps)

    def target(
        self, latents: Float[Tensor, "b c y x"], noise: Float[Tensor, "b c y x"], timesteps: Int[Tensor, " b"]
    ) -> Float[Tensor, "b c y x"]:
        """What `predict` should have said: the noise, or v = sqrt(abar_t) noise - sqrt(1 - abar_t) latents.

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
        """The U-Net's answer, in fp32; its condition may have any number of tokens."""
        dtype = self.unet.dtype
        unet = self.unet if torch.is_grad_enabled() else self.unet.forward  # which is never the compiled one
        # On a CPU, fused attention is slower than plain products in the backward pass of bf16. Activations that
        # are computed a second time are computed outside of this choice, so checkpointing goes without it.
        plain = dtype == torch.bfloat16 and noisy.device.type == "cpu" and not self.unet.is_gradient_checkpointing
        # Weights in half precision need no autocast, which would compute norms in fp32 and cast around each.
        casts = nullcontext() if dtype == torch.float32 else torch.autocast(noisy.device.type, enabled=False)
        with sdpa_kernel(SDPBackend.MATH) if plain else nullcontext(), casts:
            return unet(noisy.to(dtype), timesteps, encoder_hidden_states=condition.to(dtype)).sample.float()

    @torch.no_grad()
    def sample(
        self,
        condition: Float[Tensor, "b t d"],
        null: Float[Tensor, "n d"],
        steps: int,
        guidance: float,
        generator: torch.Generator,
    ) -> Float[Tensor, "b 3 h w"]:
        """Images in [0, 1] drawn under conditions by DDIM, for people to look at: `condition` makes those of texts.

        Classifier-free guidance (1: none) leads away from `null`, the condition of no text.

        Source: DDIM, arXiv 2010.02502; guidance, arXiv 2207.12598.
        """
        scheduler = DDIMScheduler.from_config(self.scheduler.config, clip_sample=False)  # latents have no bounds
        scheduler.set_timesteps(steps, device=self.unet.device)
        rows = len(condition)
        shape = (rows, self.unet.config.in_channels, self.unet.config.sample_size, self.unet.config.sample_size)
        latents = torch.randn(shape, generator=generator, device=generator.device).to(self.unet.device)
        for timestep in scheduler.timesteps:
            told, untold = (
                self.predict(latents, timestep.expand(rows), given) for given in (condition, null.expand(rows, -1, -1))
            )
            guided = untold + guidance * (told - untold)
            latents = scheduler.step(guided, timestep, latents).prev_sample
        return self.decode(latents)

    def save_pretrained(
        self, folder: str | Path, dtype: torch.dtype, weights: Mapping[str, Tensor] | None = None
    ) -> None:
        """Write the folder that the constructor reads, in `dtype`: own weights, or those given by name instead."""
        parts = self.unet, self.vae, self.text_encoder, self.tokenizer, self.scheduler
        _write(folder, dtype, *parts, weights or {})


def _tokenize(tokenizer: CLIPTokenizer, texts: list[str]) -> Int[Tensor, "b t"]:
    """Return token ids of texts, cut or padded to the length that the text encoder reads."""
    length = tokenizer.model_max_length
    return tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids


def has_bf16() -> bool:
    """Whether the GPU, or without one the CPU, computes in bf16 itself: emulated, it is slower than fp32."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported()


# What a folder holds beside the tokenizer, each part with the file that describes it.
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
    """Refuses parts that do not fit each other, from their configs: no weight is read, let alone a step trained."""
    if vae["_class_name"] not in VAES:
        raise ValueError(f"{path} has a {vae['_class_name']}: diffusion.path takes a model with {' or '.join(VAES)}.")
    prediction_type = scheduler.get("prediction_type", "epsilon")
    if prediction_type not in ("epsilon", "v_prediction"):
        raise ValueError(
            f"{path} predicts {prediction_type!r}: diffusion.path takes a model of epsilon or v_prediction."
        )
    if unet.get("addition_embed_type") is not None:  # SDXL
        raise ValueError(
            f"{path} is told more than a text (addition_embed_type is {unet['addition_embed_type']!r}): "
            "diffusion.path takes a model of the kind of Stable Diffusion 1.x or 2.x."
        )
    if unet.get("class_embed_type") is not None:
        raise ValueError(
            f"{path} is told more than a text (class_embed_type is {unet['class_embed_type']!r}): "
            "diffusion.path takes a model of the kind of Stable Diffusion 1.x or 2.x."
        )
    if not isinstance(unet["sample_size"], int):
        raise ValueError(
            f"unet/config.json of {path} has the sample_size {unet['sample_size']}: give one whole number."
        )
    channels, width = vae["latent_channels"], text_encoder["hidden_size"]
    if not unet["in_channels"] == unet["out_channels"] == channels:  # inpainting, depth, upscaling
        raise ValueError(
            f"The U-Net of {path} reads {unet['in_channels']} channels and answers with {unet['out_channels']}, its "
            f"autoencoder makes {channels}: diffusion.path takes a text-to-image model, where all three are the same."
        )
    if unet["cross_attention_dim"] != width:
        raise ValueError(
            f"The U-Net of {path} attends to a width of {unet['cross_attention_dim']}, its text encoder gives {width}: "
            "put the text encoder that the U-Net was trained with into the folder."
        )


def blank(
    folder: str, unet: dict[str, Any], vae: dict[str, Any], text_encoder: dict[str, Any], scheduler: dict[str, Any]
) -> Diffusion:
    """A generator with random weights, written to `folder` first: where pretraining starts.

    The dictionaries hold what the classes of diffusers and transformers take. Token embeddings start at zero: rows of
    words that training never meets stay there, and the 49,408 rows of CLIP's vocabulary compress to the few that occur.
    """
    text_model = CLIPTextModel(CLIPTextConfig(**text_encoder))
    nn.init.zeros_(text_model.get_input_embeddings().weight)  # type: ignore[arg-type]
    tokenizer = clip_tokenizer(text_model.config.max_position_embeddings)
    parts = UNet2DConditionModel(**unet), PatchPCA(**vae), text_model, tokenizer, DDPMScheduler(**scheduler)
    _write(folder, torch.float32, *parts, weights={})
    return Diffusion(folder)


def _folder(path: str, revision: str | None) -> Path:
    """The local folder of a diffusers model; from the hub only the files that are read here."""
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
        own = model.state_dict()
        return {key: weights.get(f"{part}.{key}", tensor).to(dtype, copy=True) for key, tensor in own.items()}

    folder = Path(folder)
    models: dict[str, Any] = {"unet": unet, "vae": vae}
    for name, model in models.items():
        with torch.device("meta"):  # rather than a copy of the model, which has no copy where its weights are sharded
            plain = type(model).from_config(model.config)
        plain.load_state_dict(state(name, model), assign=True)
        plain.save_pretrained(folder / name)
        config = json.loads((folder / name / "config.json").read_text())
        config.pop("_name_or_path", None)  # where it was loaded from is nobody's business elsewhere
        (folder / name / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    scheduler.save_pretrained(folder / "scheduler")  # type: ignore[attr-defined]
    # tokenizer.json holds vocabulary and merges once more, at twice the size, and transformers 4 does without it.
    for name in tokenizer.save_pretrained(folder / "tokenizer"):
        if name.endswith("tokenizer.json"):
            Path(name).unlink()
    tokenizer.backend_tokenizer.model.save(str(folder / "tokenizer"))
    # transformers 5 writes keys without the prefix that every Stable Diffusion folder has and transformers 4 needs.
    prefix = "text_model."
    named = {prefix + key.removeprefix(prefix): tensor for key, tensor in state("text_encoder", text_encoder).items()}
    text_encoder.config.save_pretrained(folder / "text_encoder")
    save_file(named, folder / "text_encoder/model.safetensors", metadata={"format": "pt"})
