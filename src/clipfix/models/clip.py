"""Backbone: CLIP models of open_clip with one interface for images, texts, visual tokens and tokenization.

The wrapper takes images in [0, 1] and normalizes them as each model requires. It gives every model a `.visual` and a
`.text` tower to train or freeze, and it never resizes the weights of a checkpoint silently. `pretrained.py` finds the
architecture and the weights.
"""

import json
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import open_clip
import torch
from jaxtyping import Float, Int
from open_clip.timm_model import TimmModel
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
from open_clip.transformer import ResidualAttentionBlock, TextTransformer, VisionTransformer, text_global_pool
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from clipfix.functional.positions import stretch
from clipfix.models.attention import SelfAttention
from clipfix.models.base import Model
from clipfix.models.packed_text import add_packed_method, encode_packed
from clipfix.models.pretrained import (
    CONFIG_FILE,
    WEIGHT_FILES,
    assign_weights,
    build_model,
    find_config,
    find_folder,
    find_weights,
    load_tokenizer,
    load_weights,
    read_weights,
)
from clipfix.models.tokenizer import Tokens
from clipfix.system.files import atomic_write


class Backbone(Model):
    """A CLIP: a visual tower, a text tower, a temperature and a tokenizer.

    Args:
        name: an open_clip architecture (`ViT-L-14-quickgelu`), a folder of open_clip or transformers (`CLIPModel`,
            `SiglipModel`), or `hf-hub:org/repo`.
        pretrained: an open_clip tag, a file in a layout that `convert.py` reads (DIVA's and Long-CLIP's among them), or
            `random`. None loads the weights of a folder, and is `random` for an architecture.
        context_length: number of tokens of a text. It must equal the checkpoint's position table. None takes it from
            the file. Loading never stretches the table; that is the work of a method (Long-CLIP).
        text_from: a folder whose text tower and temperature replace those of this model.
        compiled: compile the blocks of both towers with torch.compile. It takes a minute at the start, and makes steps
            on a GPU faster (benchmarks/RESULTS.md). It needs a C++ compiler. Passes without gradients are not compiled.
        checkpointing: gradient checkpointing: keep activations between blocks only, and compute the others again in
            the backward pass.

    Raises:
        ValueError: if the architecture or the weights cannot be found, or do not fit each other.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        name: str,
        pretrained: str | None = None,
        context_length: int | None = None,
        text_from: str | None = None,
        compiled: bool = False,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.name = name
        self.folder = find_folder(name)
        self.config, preprocess = find_config(name, self.folder, pretrained)
        if context_length is not None:
            self.config["text_cfg"]["context_length"] = context_length
        weights = find_weights(name, self.folder, pretrained)
        state = read_weights(weights, name, self.config) if weights else None
        if state is not None and context_length is None and pretrained is not None:
            rows = len(state.get("text.positional_embedding", ()))
            self.config["text_cfg"]["context_length"] = rows or self.context_length
        self.model = build_model(self.config)
        self.preprocess = preprocess | {"size": self.image_size}
        mean, std = (torch.tensor(preprocess[key], dtype=torch.float32).view(3, 1, 1) for key in ("mean", "std"))
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)
        if state is not None:
            load_weights(self.model, state, weights, name)
        elif isinstance(self.model.text, TextTransformer):
            # From zero, because words that training never reads then add nothing, and zeros compress well in a file.
            nn.init.zeros_(self.model.text.get_parameter("token_embedding.weight"))
        if text_from:
            teacher = Backbone(text_from)
            self.text.load_state_dict(teacher.text.state_dict())
            self.logit_scale.data.copy_(teacher.logit_scale.data)
        SelfAttention.convert(self.model)
        self.compiled = False
        if self._packs:
            add_packed_method(_blocks(self.text), compiled=False)
        if compiled:
            self.compile_blocks()
        if checkpointing:
            towers: list[Any] = [self.visual, self.text]
            for tower in towers:
                tower.set_grad_checkpointing()

    def compile_blocks(self) -> None:
        """Compile the blocks of both towers with torch.compile, for passes with gradients.

        All blocks of a tower share one graph, which takes seconds to compile; a whole tower would take minutes.
        """
        self.compiled = True
        towers = [self.visual] if self._packs else [self.visual, self.text]
        for block in [block for tower in towers for block in _blocks(tower)]:
            block.compile(dynamic=False)
        if self._packs:
            add_packed_method(_blocks(self.text), compiled=True)

    @property
    def backbone(self) -> "Backbone":  # type: ignore[override]
        """This model itself, so that a `Wrapper` and a Backbone are used alike."""
        return self

    @property
    def weights(self) -> nn.Module:
        """The open_clip model."""
        return self.model

    @property
    def visual(self) -> nn.Module:
        return self.model.visual

    @property
    def text(self) -> nn.Module:
        return self.model.text

    @property
    def logit_scale(self) -> nn.Parameter:
        """Natural logarithm of the inverse temperature."""
        return self.model.logit_scale

    @property
    def logit_bias(self) -> nn.Parameter | None:
        """Offset of the logits of a model that was trained with the sigmoid loss, such as SigLIP; None for others."""
        return self.model.logit_bias

    @property
    def image_size(self) -> int:
        """Side of the square input images of the visual tower, in pixels."""
        size = self.model.visual.image_size
        height, width = (size, size) if isinstance(size, int) else size
        assert height == width, f"{self.name} takes images of {height} x {width}"
        return height

    @property
    def embed_dim(self) -> int:
        return self.config["embed_dim"]

    @property
    def context_length(self) -> int:
        return self.config["text_cfg"].get("context_length", open_clip.CLIPTextCfg.context_length)

    def stretch(self, keep: int, ratio: int) -> None:
        """Stretch the position table of the text tower, and with it the context length.

        `save` then writes one ordinary table of the new length.

        Args:
            keep: number of first rows that do not change.
            ratio: rows for each of the other rows.

        Raises:
            ValueError: if the tower has no position table of CLIP's kind, or the arguments do not fit it; if it reads
                its feature from the last position, as SigLIP's does: that of a longer context has never been trained,
                so the features of every text would change (open_clip issues 1067 and 1080).
        """
        if not isinstance(self.text, TextTransformer) or self.text.cls_emb is not None:
            raise ValueError(
                f"backbone.name={self.name} has no position table that can be stretched: choose a model with the "
                "text tower of open_clip (ViT-B-32, ViT-L-14-quickgelu, ...)."
            )
        if ratio > 1 and self.text.pool_type not in ("argmax", "eos"):
            raise ValueError(
                f"backbone.name={self.name} reads the feature of a text from its {self.text.pool_type} position, so a "
                "longer context would change the features of all texts: set method.ratio=1, or choose a model that "
                "reads it from the end token (ViT-B-32, ViT-L-14-quickgelu, ...)."
            )
        self.set_positions(stretch(self.text.positional_embedding.detach(), keep, ratio))

    def set_positions(self, table: Float[Tensor, "n d"]) -> None:
        """Replace the position table of the text tower; its number of rows becomes the context length."""
        text: Any = self.text
        text.positional_embedding = nn.Parameter(table.clone())
        text.context_length = text.num_pos = self.config["text_cfg"]["context_length"] = len(table)
        if text.attn_mask is not None:
            text.attn_mask = text.build_causal_mask().to(table.device)

    def encode_image(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        """Return features of images in [0, 1] in the joint space, not normalized."""
        with self._without_compiled_blocks():
            return self.model.encode_image(self._pixels(images))

    def visual_tokens(self, images: Float[Tensor, "b 3 h w"]) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b n d"]]:
        """Return image features and patch features, both in the joint space and not normalized, from one pass.

        CLIP has no features of patches. The patch tokens go through the same layers as the pooled token: the final norm
        and the projection.

        Raises:
            ValueError: if the visual tower has no patch tokens in the joint space.

        Source: DIVA (arXiv 2407.20171) computes its visual condition in this way.
        """
        with self._without_compiled_blocks():
            return self._visual_tokens(self._pixels(images))

    def _visual_tokens(self, pixels: Float[Tensor, "b 3 s s"]) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b n d"]]:
        visual = self.visual
        if isinstance(visual, VisionTransformer) and visual.attn_pool is None and visual.pool_type != "none":
            out = visual.forward_intermediates(pixels, indices=1, normalize_intermediates=True, output_fmt="NLC")
            return out["image_features"], out["image_intermediates"][0] @ visual.proj
        if isinstance(visual, TimmModel) and isinstance(visual.trunk, TimmVisionTransformer):
            trunk = visual.trunk
            tokens = trunk.forward_features(pixels)
            patches = trunk.head(trunk.fc_norm(tokens[:, trunk.num_prefix_tokens :]))
            return visual.head(trunk.forward_head(tokens)), visual.head(patches)
        raise ValueError(
            f"backbone.name={self.name} has no patch tokens in the joint space. Choose a CLIP ViT (ViT-B-32, "
            "ViT-L-14-quickgelu, ...) or a timm ViT (ViT-SO400M-14-SigLIP, ...); ResNet, ConvNeXt and CoCa have none."
        )

    def encode_text(self, tokens: Int[Tensor, "b l"]) -> Float[Tensor, "b d"]:
        """Return features of token ids in the joint space, not normalized.

        A causal tower pools at the end token, which has the largest id, and tokens after it cannot change the feature.
        Ordinary CLIP towers therefore compute no padding at all (`packed_text.py`). Towers with other blocks get texts
        cut to the longest of the batch; the forward pass of open_clip needs the full length, so its steps are repeated
        here.
        """
        with self._without_compiled_blocks():
            return self._encode_text(tokens)

    def _encode_text(self, tokens: Int[Tensor, "b l"]) -> Float[Tensor, "b d"]:
        text = self.model.text
        if not self._ignores_padding:
            return self.model.encode_text(tokens)
        if self._packs:
            return encode_packed(text, tokens)
        length = int(tokens.argmax(dim=1).max()) + 1
        tokens = tokens[:, :length]
        dtype = text.transformer.get_cast_dtype()
        x = text.token_embedding(tokens).to(dtype) + text.positional_embedding[:length].to(dtype)
        x = text.ln_final(text.transformer(x, attn_mask=text.attn_mask[:length, :length]))
        return text_global_pool(x, tokens, pool_type="argmax") @ text.text_projection

    @property
    def _ignores_padding(self) -> bool:
        """True if tokens after the end token of a text cannot change its feature."""
        text = self.model.text
        causal = isinstance(text, TextTransformer) and text.attn_mask is not None and text.cls_emb is None
        return causal and text.pool_type == "argmax" and isinstance(text.text_projection, nn.Parameter)

    @property
    def _packs(self) -> bool:
        """True if `encode_packed` can compute this text tower."""
        return self._ignores_padding and all(type(block) is ResidualAttentionBlock for block in _blocks(self.text))

    def _without_compiled_blocks(self) -> AbstractContextManager[Any]:
        """Return a context for passes without gradients, which run eagerly: each new size would be compiled again."""
        if self.compiled and not torch.is_grad_enabled():
            return torch.compiler.set_stance("force_eager")
        return nullcontext()

    def tokenize(self, texts: list[str], at_most: int | None = None) -> Int[Tensor, "b l"]:
        """Return the token ids of texts on the model's device (see `Tokens`)."""
        return self.tokens(texts, at_most).to(self.logit_scale.device)

    @property
    def tokens(self) -> Tokens:
        """The tokenizer at the current context length. It holds no model, so the loader's workers can use a copy."""
        return Tokens(self.tokenizer, self.context_length)

    def load_trained(self, state: Mapping[str, Tensor]) -> None:
        """Load the weights named `backbone.*`; other weights of the model do not change.

        A position table of another length, such as Long-CLIP's, changes the context length.
        """
        prefix = "backbone."
        weights = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        positions = weights.get("model.text.positional_embedding")
        current = getattr(self.text, "positional_embedding", None)
        if positions is not None and current is not None and positions.shape[1:] == current.shape[1:]:
            self.set_positions(positions)
        try:
            unexpected = assign_weights(self, weights, strict=False)
        except RuntimeError as error:
            raise ValueError(str(error).splitlines()[1].strip()) from error
        if unexpected:
            raise ValueError(f"{unexpected[0]} is not a weight of this model.")

    def as_open_clip(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the weights by the names that open_clip expects, and the content of `open_clip_config.json`."""
        # Without `custom_text` in the config, open_clip expects the weights of the text tower without `text.`.
        plain = isinstance(self.text, TextTransformer) and not self.config.get("custom_text", False)
        state = {key.removeprefix("text.") if plain else key: value for key, value in self.model.state_dict().items()}
        return state, {"model_cfg": self.config, "preprocess_cfg": self.preprocess}

    def save(self, folder: str | Path, dtype: torch.dtype = torch.float16) -> Path:
        """Write a folder that `backbone.name=<folder>` and `local-dir:` of open_clip load, and return it."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state, described = self.as_open_clip()
        weights = folder / WEIGHT_FILES[0]
        with atomic_write(weights) as draft:  # because the weights in memory may be mapped from this file
            save_file({key: value.to("cpu", dtype).contiguous() for key, value in state.items()}, draft)
            draft.chmod(0o644)  # safetensors makes the file readable for its owner only
        (folder / CONFIG_FILE).write_text(json.dumps(described, indent=2) + "\n")
        return folder

    def _pixels(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 s s"]:
        """Return images at the size of the tower, normalized. Bicubic interpolation overshoots, hence the clamp."""
        side = self.image_size
        if images.shape[-2:] != (side, side):
            images = F.interpolate(images, (side, side), mode="bicubic", antialias=True).clamp(0, 1)
        return (images - self.mean) / self.std

    @cached_property
    def tokenizer(self) -> SimpleTokenizer | HFTokenizer:
        """The tokenizer, loaded on first use: some are on the hub, and images need none."""
        return load_tokenizer(self.name, self.folder, self.config["text_cfg"], self.context_length)


def _blocks(tower: Any) -> Iterable[nn.Module]:
    """Return the residual blocks of a tower of open_clip or timm; none for others (a ResNet, a BERT)."""
    if isinstance(tower, TimmModel):
        return getattr(tower.trunk, "blocks", ())
    return getattr(getattr(tower, "transformer", None), "resblocks", ())


def weights_hash(module: nn.Module) -> str:
    """Return the SHA-256 of the weights' names, shapes and fp32 values. It does not depend on the file format."""
    digest = sha256()
    for name, weight in sorted(module.state_dict().items()):
        if weight.is_floating_point():
            weight = weight.float()
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        digest.update(weight.cpu().contiguous().numpy().data)
    return digest.hexdigest()
