"""open_clip behind a few verbs: image, text, visual tokens, tokenize.

Why a wrapper: images travel as [0, 1] and each model normalizes for itself, every model has a `.visual` and a `.text`
tower to train or freeze, and no checkpoint is bent into shape silently. What is loaded, and from where,
pretrained.py finds.
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
from clipfix.models.packed_text import encode_packed, install
from clipfix.models.pretrained import (
    CONFIG_FILE,
    WEIGHT_FILES,
    assign,
    build,
    describe,
    fill,
    find_folder,
    find_weights,
    read,
    tokenizer,
)
from clipfix.models.tokenizer import Tokens
from clipfix.system.files import atomic_write


class Backbone(Model):
    """A CLIP: two towers, one temperature, one tokenizer.

    `name` is an open_clip architecture (`ViT-L-14-quickgelu`), a folder of open_clip or transformers (`CLIPModel`,
    `SiglipModel`), or `hf-hub:org/repo`. `pretrained` is an open_clip tag, a file in any layout that `convert.py`
    knows (DIVA's and Long-CLIP's own among them), `random`, or null: the folder's own weights, or random ones for an
    architecture. `context_length` must equal the checkpoint's position table; null takes that of a file. Stretching it
    is a method's work (Long-CLIP), never a side effect of loading. `text_from` is a folder whose text tower and
    temperature replace this model's own. `compiled` hands the blocks of both towers to torch.compile: a minute at the
    start, then faster steps on a GPU (benchmarks/RESULTS.md). It needs a C++ compiler; passes without gradients, few
    and of other sizes, run as they are. `checkpointing` keeps the activations at block borders alone and computes the
    others a second time in the backward pass.
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
        self.config, preprocess = describe(name, self.folder, pretrained)
        if context_length is not None:
            self.config["text_cfg"]["context_length"] = context_length
        weights = find_weights(name, self.folder, pretrained)
        state = read(weights, name, self.config) if weights else None
        if state is not None and context_length is None and pretrained is not None:
            rows = len(state.get("text.positional_embedding", ()))
            self.config["text_cfg"]["context_length"] = rows or self.context_length
        self.model = build(self.config)
        self.preprocess = preprocess | {"size": self.image_size}
        mean, std = (torch.tensor(preprocess[key], dtype=torch.float32).view(3, 1, 1) for key in ("mean", "std"))
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)
        if state is not None:
            fill(self.model, state, weights, name)
        elif isinstance(self.model.text, TextTransformer):
            # Words start at nothing: one that training never reads says nothing, and leaves zeros in the file.
            nn.init.zeros_(self.model.text.get_parameter("token_embedding.weight"))
        if text_from:
            teacher = Backbone(text_from)
            self.text.load_state_dict(teacher.text.state_dict())
            self.logit_scale.data.copy_(teacher.logit_scale.data)
        SelfAttention.take_over(self.model)
        self.compiled = False
        if self._packs:
            install(_blocks(self.text), compiled=False)
        if compiled:
            self.compile_blocks()
        if checkpointing:
            towers: list[Any] = [self.visual, self.text]
            for tower in towers:
                tower.set_grad_checkpointing()

    def compile_blocks(self) -> None:
        """Hand the blocks of both towers to torch.compile, for passes with gradients.

        Block by block: all of a tower share one graph, which takes seconds, where a whole tower takes minutes.
        """
        self.compiled = True
        towers = [self.visual] if self._packs else [self.visual, self.text]
        for block in [block for tower in towers for block in _blocks(tower)]:
            block.compile(dynamic=False)
        if self._packs:
            install(_blocks(self.text), compiled=True)

    @property
    def backbone(self) -> "Backbone":  # type: ignore[override]
        """Itself: what it is to a `Wrapper`."""
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
    def image_size(self) -> int:
        """Side of the square picture that the visual tower reads, in pixels."""
        size = self.model.visual.image_size
        height, width = (size, size) if isinstance(size, int) else size
        assert height == width, f"{self.name} reads {height} x {width} pictures"
        return height

    @property
    def embed_dim(self) -> int:
        return self.config["embed_dim"]

    @property
    def context_length(self) -> int:
        return self.config["text_cfg"].get("context_length", open_clip.CLIPTextCfg.context_length)

    def stretch(self, keep: int, ratio: int) -> None:
        """Make the text tower read longer texts: `functional.positions.stretch` on its table, all that hangs on it too.

        `save` then writes one ordinary table of the new length.
        """
        if not isinstance(self.text, TextTransformer) or self.text.cls_emb is not None:
            raise ValueError(
                f"backbone.name={self.name} has no position table of CLIP's kind to stretch: choose a model whose text "
                "tower is open_clip's own (ViT-B-32, ViT-L-14-quickgelu, ViT-B-16-SigLIP, ...)."
            )
        self.set_positions(stretch(self.text.positional_embedding.detach(), keep, ratio))

    def set_positions(self, table: Float[Tensor, "n d"]) -> None:
        """Another position table for the text tower; its number of rows is the new context length."""
        text: Any = self.text
        text.positional_embedding = nn.Parameter(table.clone())
        text.context_length = text.num_pos = self.config["text_cfg"]["context_length"] = len(table)
        if text.attn_mask is not None:
            text.attn_mask = text.build_causal_mask().to(table.device)

    def encode_image(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        """Pictures in [0, 1] to the joint space, not normalized."""
        with self._stance():
            return self.model.encode_image(self._pixels(images))

    def visual_tokens(self, images: Float[Tensor, "b 3 h w"]) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b n d"]]:
        """The image embedding and every patch beside it, both in the joint space, from one pass through the tower.

        A patch has no embedding of its own in CLIP; it takes the road of the pooled token: final norm, projection.
        Source: DIVA (arXiv 2407.20171) reads its visual condition in this way.
        """
        with self._stance():
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
        """Token ids to the joint space, not normalized.

        A causal tower pools at the end-of-text token, the largest id, and nothing after it can change the feature. So
        ordinary CLIP towers compute no padding at all (`packed.py`): in a batch of long and short captions, cutting to
        the longest would leave most of the work to padding. Towers with other blocks are cut to the longest text;
        open_clip's own forward insists on the full length, hence its four steps are taken here.
        """
        with self._stance():
            return self._encode_text(tokens)

    def _encode_text(self, tokens: Int[Tensor, "b l"]) -> Float[Tensor, "b d"]:
        text = self.model.text
        if not self._cuts:
            return self.model.encode_text(tokens)
        if self._packs:
            return encode_packed(text, tokens)
        length = int(tokens.argmax(dim=1).max()) + 1
        tokens = tokens[:, :length]
        x, mask = text._embeds(tokens)
        x = text.ln_final(text.transformer(x, attn_mask=mask[:length, :length]))
        return text_global_pool(x, tokens, pool_type="argmax") @ text.text_projection

    @property
    def _cuts(self) -> bool:
        """Whether what stands behind a text's end token cannot reach its feature."""
        text = self.model.text
        causal = isinstance(text, TextTransformer) and text.attn_mask is not None and text.cls_emb is None
        return causal and text.pool_type == "argmax" and isinstance(text.text_projection, nn.Parameter)

    @property
    def _packs(self) -> bool:
        """Whether `encode_packed` computes this text tower."""
        return self._cuts and all(type(block) is ResidualAttentionBlock for block in _blocks(self.text))

    def _stance(self) -> AbstractContextManager[Any]:
        """Compiled blocks are for training: each other size would be compiled anew, for a few passes."""
        if self.compiled and not torch.is_grad_enabled():
            return torch.compiler.set_stance("force_eager")
        return nullcontext()

    def tokenize(self, texts: list[str], at_most: int | None = None) -> Int[Tensor, "b l"]:
        """Return the token ids of texts on the model's device (see `Tokens`)."""
        return self.tokens(texts, at_most).to(self.logit_scale.device)

    @property
    def tokens(self) -> Tokens:
        """The tokenizer at the present context length, apart from the model: a loader's worker can hold it."""
        return Tokens(self.tokenizer, self.context_length)

    def load_trained(self, state: Mapping[str, Tensor]) -> None:
        """Load the weights named `backbone.*` on top of the present ones.

        A position table of another length, as Long-CLIP's, changes the context length.
        """
        prefix = "backbone."
        weights = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        positions, own = (
            weights.get("model.text.positional_embedding"),
            getattr(self.text, "positional_embedding", None),
        )
        if positions is not None and own is not None and positions.shape[1:] == own.shape[1:]:
            self.set_positions(positions)
        try:
            unexpected = assign(self, weights, strict=False)
        except RuntimeError as error:
            raise ValueError(str(error).splitlines()[1].strip()) from error
        if unexpected:
            raise ValueError(f"{unexpected[0]} is not in this one.")

    def as_open_clip(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The weights under the names that open_clip builds from `open_clip_config.json`, and that file's content."""
        # open_clip's plain CLIP keeps its text tower at the top level; only a "custom text" config has `text.` keys.
        plain = isinstance(self.text, TextTransformer) and not self.config.get("custom_text", False)
        state = {key.removeprefix("text.") if plain else key: value for key, value in self.model.state_dict().items()}
        return state, {"model_cfg": self.config, "preprocess_cfg": self.preprocess}

    def save(self, folder: str | Path, dtype: torch.dtype = torch.float16) -> Path:
        """Write an open_clip folder: what `backbone.name=<folder>` and open_clip's own `local-dir:` load."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state, described = self.as_open_clip()
        weights = folder / WEIGHT_FILES[0]
        with atomic_write(weights) as draft:  # the weights may still be read from this very file
            save_file({key: value.to("cpu", dtype).contiguous() for key, value in state.items()}, draft)
            draft.chmod(0o644)  # safetensors writes for its owner alone, but folders are shared and shipped
        (folder / CONFIG_FILE).write_text(json.dumps(described, indent=2) + "\n")
        return folder

    def _pixels(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 s s"]:
        """What the tower reads: its own size, mean and deviation. Bicubic overshoots at edges, so it is clamped."""
        side = self.image_size
        if images.shape[-2:] != (side, side):
            images = F.interpolate(images, (side, side), mode="bicubic", antialias=True).clamp(0, 1)
        return (images - self.mean) / self.std

    @cached_property
    def tokenizer(self) -> SimpleTokenizer | HFTokenizer:
        """Built when the first text comes: some tokenizers live on the hub, and a picture needs none."""
        return tokenizer(self.name, self.folder, self.config["text_cfg"], self.context_length)


def _blocks(tower: Any) -> Iterable[nn.Module]:
    """The residual blocks of a tower of open_clip or timm; none of one that has no such list (a ResNet, a BERT)."""
    if isinstance(tower, TimmModel):
        return getattr(tower.trunk, "blocks", ())
    return getattr(getattr(tower, "transformer", None), "resblocks", ())


def weights_hash(module: nn.Module) -> str:
    """SHA-256 of the weights by name, shape and fp32 value: the same for the same weights from whatever file."""
    digest = sha256()
    for name, weight in sorted(module.state_dict().items()):
        if weight.is_floating_point():
            weight = weight.float()
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        digest.update(weight.cpu().contiguous().numpy().data)
    return digest.hexdigest()
