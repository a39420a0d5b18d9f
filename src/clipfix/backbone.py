"""open_clip behind a few verbs: image, text, visual tokens, tokenize.

Why a wrapper: images travel as [0, 1] and each model normalizes for itself, every model has a `.visual` and a `.text`
tower to train or freeze, and no checkpoint is bent into shape silently. Nothing else in the package knows open_clip.
"""

import json
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import asdict
from functools import cached_property
from hashlib import sha256
from itertools import compress
from pathlib import Path
from typing import Any

import huggingface_hub
import open_clip
import torch
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from jaxtyping import Float, Int
from open_clip.convert import convert_state_dict
from open_clip.model import convert_to_custom_text_state_dict
from open_clip.timm_model import TimmModel
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
from open_clip.transform import PreprocessCfg, merge_preprocess_dict
from open_clip.transformer import ResidualAttentionBlock, TextTransformer, VisionTransformer, text_global_pool
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from clipfix import convert
from clipfix.functional.positions import stretch
from clipfix.packed import encode_packed

CONFIG_FILE, TRANSFORMERS_FILE = "open_clip_config.json", "config.json"
WEIGHT_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
TRANSFORMERS_WEIGHTS = ("model.safetensors", "model-00001-of-*.safetensors", "pytorch_model.bin")


class Backbone(nn.Module):
    """A CLIP: two towers, one temperature, one tokenizer.

    `name` is an open_clip architecture (`ViT-L-14-quickgelu`), a folder of open_clip or transformers (`CLIPModel`,
    `SiglipModel`), or `hf-hub:org/repo`. `pretrained` is an open_clip tag, a file in any layout that `convert.py`
    knows (DIVA's and Long-CLIP's own among them), `random`, or null: the folder's own weights, or random ones for an
    architecture. `context_length` must equal the checkpoint's position table; null takes that of a file. Stretching it
    is a method's work (Long-CLIP), never a side effect of loading. `text_from` is a folder whose text tower and
    temperature replace this model's own.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        name: str,
        pretrained: str | None = None,
        context_length: int | None = None,
        text_from: str | None = None,
    ) -> None:
        super().__init__()
        self.name = name
        self.folder = _find_folder(name)
        self.config, preprocess = _describe(name, self.folder, pretrained)
        if context_length is not None:
            self.config["text_cfg"]["context_length"] = context_length
        weights = _find_weights(name, self.folder, pretrained)
        state = _read(weights, name, self.config) if weights else None
        if state is not None and context_length is None and pretrained is not None:
            rows = len(state.get("text.positional_embedding", ()))
            self.config["text_cfg"]["context_length"] = rows or self.context_length
        self.model = _build(self.config)
        self.preprocess = preprocess | {"size": self.image_size}
        mean, std = (torch.tensor(preprocess[key], dtype=torch.float32).view(3, 1, 1) for key in ("mean", "std"))
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)
        if state is not None:
            _fill(self.model, state, weights, name)
        elif isinstance(self.model.text, TextTransformer):
            # Words start at nothing: one that training never reads says nothing, and leaves zeros in the file.
            nn.init.zeros_(self.model.text.get_parameter("token_embedding.weight"))
        if text_from:
            teacher = Backbone(text_from)
            self.text.load_state_dict(teacher.text.state_dict())
            self.logit_scale.data.copy_(teacher.logit_scale.data)

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

    def checkpoint_visual(self) -> None:
        """Keep activations at block borders alone; the backward pass computes the visual tower's others once more."""
        visual: Any = self.visual
        visual.set_grad_checkpointing()

    def encode_image(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        """Pictures in [0, 1] to the joint space, not normalized."""
        return self.model.encode_image(self._pixels(images))

    def visual_tokens(self, images: Float[Tensor, "b 3 h w"]) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b n d"]]:
        """The image embedding and every patch beside it, both in the joint space, from one pass through the tower.

        A patch has no embedding of its own in CLIP; it takes the road of the pooled token: final norm, projection.
        Source: DIVA (arXiv 2407.20171) reads its visual condition in this way.
        """
        pixels, visual = self._pixels(images), self.visual
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
        text = self.model.text
        causal = isinstance(text, TextTransformer) and text.attn_mask is not None and text.cls_emb is None
        if not (causal and text.pool_type == "argmax" and isinstance(text.text_projection, nn.Parameter)):
            return self.model.encode_text(tokens)
        if all(type(block) is ResidualAttentionBlock for block in text.transformer.resblocks):
            return encode_packed(text, tokens)
        length = int(tokens.argmax(dim=1).max()) + 1
        tokens = tokens[:, :length]
        x, mask = text._embeds(tokens)
        x = text.ln_final(text.transformer(x, attn_mask=mask[:length, :length]))
        return text_global_pool(x, tokens, pool_type="argmax") @ text.text_projection

    def tokenize(self, texts: list[str], at_most: int | None = None) -> Int[Tensor, "b l"]:
        """Texts to token ids on the model's device, cut to the context length, or before that to `at_most` tokens.

        A cut text keeps its end token, as far as the model's tokenizer gives one.
        """
        tokens = self.tokenizer(texts, min(at_most or self.context_length, self.context_length))
        padded = F.pad(tokens, (0, self.context_length - tokens.shape[1]), value=self._padding)
        return padded.to(self.logit_scale.device)

    def cut_share(self, texts: list[str], tokens: Int[Tensor, "b l"]) -> float:
        """Which share of the texts, tokenized as `tokens`, did not fit the context."""
        full = (tokens[:, -1] != self._padding).tolist()  # only these are worth a second look
        if not any(full):
            return 0.0
        longer = self.tokenizer(list(compress(texts, full)), self.context_length + 1)
        return int((longer[:, -1] != self._padding).sum()) / len(texts)

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
        draft = weights.with_name(f".{weights.name}.part")  # the weights may still be read from this very file
        save_file({key: value.to("cpu", dtype).contiguous() for key, value in state.items()}, draft)
        draft.chmod(0o644)  # safetensors writes for its owner alone, but folders are shared and shipped
        draft.replace(weights)
        (folder / CONFIG_FILE).write_text(json.dumps(described, indent=2) + "\n")
        return folder

    def _pixels(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 s s"]:
        """What the tower reads: its own size, mean and deviation. Bicubic overshoots at edges, so it is clamped."""
        side = self.image_size
        if images.shape[-2:] != (side, side):
            images = F.interpolate(images, (side, side), mode="bicubic", antialias=True).clamp(0, 1)
        return (images - self.mean) / self.std

    @cached_property
    def _padding(self) -> int:
        """The token that fills up the context behind a text."""
        return int(self.tokenizer([""], self.context_length)[0, -1])

    @cached_property
    def tokenizer(self) -> SimpleTokenizer | HFTokenizer:
        """Built when the first text comes: some tokenizers live on the hub, and a picture needs none."""
        text = self.config["text_cfg"]
        options = text.get("tokenizer_kwargs", {})
        if (repo := text.get("hf_tokenizer_name")) is None:
            _check_vocabulary(self.name, self.folder)
            return SimpleTokenizer(context_length=self.context_length, **options)
        source = (
            self.folder if self.folder and list(self.folder.glob("tokenizer*")) else _hub_folder(repo, "*tokenizer*")
        )
        return HFTokenizer(str(source), context_length=self.context_length, **options)


def assign(module: nn.Module, state: Mapping[str, Tensor], strict: bool = True) -> list[str]:
    """Puts tensors in the place of a module's own; gives the names that it does not have.

    Large files are mapped into memory, so that a model is there once and not twice. Only what has another type than the
    module's is copied, into what the module has.
    """
    own = module.state_dict()
    other = {key for key in own.keys() & state.keys() if state[key].dtype != own[key].dtype}
    taken = {key: own[key].copy_(weight) if key in other else weight for key, weight in state.items()}
    return module.load_state_dict(taken, strict, assign=True).unexpected_keys


def weights_hash(module: nn.Module) -> str:
    """SHA-256 of the weights by name, shape and fp32 value: the same for the same weights from whatever file."""
    digest = sha256()
    for name, weight in sorted(module.state_dict().items()):
        if weight.is_floating_point():
            weight = weight.float()
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        digest.update(weight.cpu().contiguous().numpy().data)
    return digest.hexdigest()


def _find_folder(name: str) -> Path | None:
    """The folder of open_clip or transformers that `backbone.name` points at, if it does."""
    if name.startswith("hf-hub:"):
        return _hub_folder(name.removeprefix("hf-hub:"), "*.json", "*.txt", "*.model")
    folder = Path(name.removeprefix("local-dir:")).expanduser()
    if (folder / CONFIG_FILE).is_file() or (folder / TRANSFORMERS_FILE).is_file():
        return folder
    if folder.is_dir() or name.startswith("local-dir:"):
        raise ValueError(
            f"backbone.name={name} is no folder of a CLIP: it holds neither {CONFIG_FILE} (open_clip) nor "
            f"{TRANSFORMERS_FILE} (transformers)."
        )
    return None


def _describe(name: str, folder: Path | None, pretrained: str | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Architecture and preprocessing, from the folder or from open_clip's lists."""
    if folder and (folder / CONFIG_FILE).is_file():
        described = json.loads((folder / CONFIG_FILE).read_text())
        return described["model_cfg"], asdict(PreprocessCfg(**described.get("preprocess_cfg", {})))
    if folder:
        return _describe_transformers(name, folder)
    config = open_clip.get_model_config(name)
    if config is None:
        raise ValueError(
            f"backbone.name={name} is neither an open_clip architecture nor a folder with {CONFIG_FILE} or "
            f"{TRANSFORMERS_FILE}. Architectures: {', '.join(open_clip.list_models())}"
        )
    tags = {tag: open_clip.get_pretrained_cfg(name, tag) for tag in open_clip.list_pretrained_tags_by_model(name)}
    tag = open_clip.get_pretrained_cfg(name, pretrained or "")
    if tag and tag.get("quick_gelu", False) != config.get("quick_gelu", False):
        other = name.removesuffix("-quickgelu") if config.get("quick_gelu") else f"{name}-quickgelu"
        raise ValueError(f"The weights {pretrained} were trained with the other GELU: use backbone.name={other}.")
    # A file says nothing of its mean and deviation: those that all published weights of this architecture share hold.
    shared: dict[str, Any] = tag or next(iter(tags.values()), {})
    if not tag and any(other["mean"] != shared["mean"] or other["std"] != shared["std"] for other in tags.values()):
        shared = {}
    return config, merge_preprocess_dict(PreprocessCfg(), shared)


def _describe_transformers(name: str, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same of a transformers folder.

    Departs: of SigLIP, open_clip's towers compute exact GELU where transformers takes its tanh approximation (text of
    SigLIP 2 apart), so features are those of the same weights in open_clip.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder).to_dict()
    kind = config.get("model_type")
    if kind == "clip":
        try:
            described = convert.clip_architecture(config)
        except ValueError as error:
            raise ValueError(f"backbone.name={name} has no equal in open_clip: {error}") from error
    elif kind == "siglip":
        known = {other: open_clip.get_model_config(other) for other in open_clip.list_models() if "SigLIP" in other}
        fitting = [other for other in known.values() if convert.is_siglip_of(config, other)]
        if not fitting:
            raise ValueError(f"backbone.name={name} has no equal in open_clip: choose from {', '.join(known)}.")
        described = fitting[0]
    else:
        raise ValueError(f"backbone.name={name} is a transformers folder of {kind}: only clip and siglip can be read.")
    # transformers 5 writes the pictures' part of a processor into the processor's own file.
    files = [folder / "preprocessor_config.json", folder / "processor_config.json"]
    images: dict[str, Any] = next((json.loads(file.read_text()) for file in files if file.is_file()), {})
    images = images.get("image_processor", images)
    if "image_mean" not in images:
        raise ValueError(
            f"backbone.name={name} does not say how its pictures are normalized: it needs preprocessor_config.json, "
            "which lies in the folder of the model it was made from."
        )
    return described, asdict(PreprocessCfg(mean=tuple(images["image_mean"]), std=tuple(images["image_std"])))


def _check_vocabulary(name: str, folder: Path | None) -> None:
    """CLIP's own tokenizer reads texts for a transformers folder as well, if the folder has CLIP's vocabulary."""
    if folder is None or (folder / CONFIG_FILE).is_file():
        return
    if (folder / "vocab.json").is_file():
        words = json.loads((folder / "vocab.json").read_text())
    elif (folder / "tokenizer.json").is_file():
        words = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    else:
        raise ValueError(f"backbone.name={name} has no tokenizer: it needs tokenizer.json or vocab.json.")
    start = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    if words != {start.get(word, word): number for word, number in SimpleTokenizer().encoder.items()}:
        raise ValueError(f"backbone.name={name} has another vocabulary than CLIP's; such a model cannot be read.")


def _build(config: dict[str, Any]) -> open_clip.CustomTextCLIP:
    """An untrained model with separate `.visual` and `.text` towers, whatever the architecture."""
    config = deepcopy(config)
    config.pop("custom_text", None)
    if "timm_model_name" in config["vision_cfg"]:
        config["vision_cfg"]["timm_model_pretrained"] = False
    if "hf_model_name" in config["text_cfg"]:
        config["text_cfg"]["hf_model_pretrained"] = False
    return (open_clip.CoCa if "multimodal_cfg" in config else open_clip.CustomTextCLIP)(**config)


def _find_weights(name: str, folder: Path | None, pretrained: str | None) -> Path | None:
    """The file that `backbone.pretrained` means; None means random weights."""
    if pretrained == "random" or (pretrained is None and folder is None):
        return None
    if pretrained is None:
        return _hub_weights(name.removeprefix("hf-hub:")) if name.startswith("hf-hub:") else _folder_weights(folder)
    path = Path(pretrained).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        raise ValueError(
            f"backbone.pretrained={pretrained} is a folder, which has its own architecture: set "
            f"backbone.name={pretrained} backbone.pretrained=null."
        )
    tag = open_clip.get_pretrained_cfg(name, pretrained)
    if not tag:
        known = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
        own = " For the folder's own weights: backbone.pretrained=null." if folder else ""
        raise ValueError(
            f"backbone.pretrained={pretrained} is neither a file nor a tag of {name}. Its tags: {known}.{own}"
        )
    if tag.get("hf_hub"):
        return _hub_weights(tag["hf_hub"])
    try:
        return Path(open_clip.download_pretrained(tag))
    except OSError as error:
        raise ValueError(_unfetchable(pretrained, error)) from error


def _folder_weights(folder: Path | None) -> Path:
    assert folder is not None
    patterns = WEIGHT_FILES if (folder / CONFIG_FILE).is_file() else TRANSFORMERS_WEIGHTS
    for pattern in patterns:
        if found := sorted(folder.glob(pattern)):
            return found[0]
    raise ValueError(f"{folder} holds none of {', '.join(patterns)}. For fresh weights: backbone.pretrained=random.")


def _hub_weights(repo: str) -> Path:
    """`org/name/` or `org/name/file`, as open_clip writes it, to a local file; safetensors first."""
    owner, project, file = [*repo.split("/"), ""][:3]
    for candidate in (file,) if file else (*WEIGHT_FILES, *TRANSFORMERS_WEIGHTS):
        if found := sorted(_hub_folder(f"{owner}/{project}", candidate).glob(candidate)):
            return found[0]
    raise ValueError(f"{repo} holds no weights of a CLIP. Download them and set backbone.pretrained=/path/to/file.")


def _hub_folder(repo: str, *patterns: str) -> Path:
    """Files of a hub repository, from the cache or the network.

    One snapshot call fails within a second when there is no network, where open_clip's download retries for a minute.
    """
    try:
        return Path(huggingface_hub.snapshot_download(repo, allow_patterns=list(patterns)))
    except (LocalEntryNotFoundError, HfHubHTTPError) as error:
        raise ValueError(_unfetchable(repo, error)) from error


def _unfetchable(source: str, error: Exception) -> str:
    reason = str(error).splitlines()[0]
    return (
        f"Cannot fetch {source} ({reason}). Take the weights from a local file, backbone.pretrained=/path/to/file, "
        "or everything from a folder of open_clip or transformers, backbone.name=/path/to/folder."
    )


def _read(path: Path, name: str, config: dict[str, Any]) -> dict[str, Tensor]:
    """The weights in a file under the names of a model with two towers."""
    stored = convert.read(path)
    if convert.wants_quick_gelu(stored) and not config.get("quick_gelu", False):
        other = next(iter(_fitting(stored, quick_gelu=True)), f"{name}-quickgelu")
        raise ValueError(f"{path} holds weights made from OpenAI's, trained with QuickGELU: use backbone.name={other}.")
    try:
        return convert_to_custom_text_state_dict(convert.to_open_clip(stored))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _fill(model: open_clip.CustomTextCLIP, state: dict[str, Tensor], path: Path | None, name: str) -> None:
    """Put a checkpoint into the model, strictly: open_clip's own loader would stretch position tables silently."""
    state = convert_to_custom_text_state_dict(convert_state_dict(model, state))
    own = model.state_dict()
    for key in ("logit_scale", "logit_bias"):  # (1,) in some published files
        if key in state and key in own:
            state[key] = state[key].reshape(own[key].shape)
    wrong = [key for key, weight in own.items() if key in state and state[key].shape != weight.shape]
    if wrong == ["text.positional_embedding"]:
        rows, expected = len(state[wrong[0]]), len(own[wrong[0]])
        raise ValueError(
            f"{path}: {wrong[0]} has {rows} rows, {name} expects {expected}: set backbone.context_length={rows}."
        )
    if wrong:
        shapes = f"{wrong[0]} is {tuple(state[wrong[0]].shape)}, {name} expects {tuple(own[wrong[0]].shape)}"
        choices = " or ".join(_fitting(state)) or "the architecture that it was trained as, or a folder of it"
        raise ValueError(f"{path} is another architecture: {shapes}. Choose backbone.name={choices}.")
    try:
        assign(model, state)
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit backbone.name={name}: {error}") from error


def _fitting(state: dict[str, Tensor], quick_gelu: bool = False) -> list[str]:
    """Architectures of open_clip with weights of exactly these shapes; the length of texts alone may differ."""
    shapes = _shapes(convert_to_custom_text_state_dict(convert.to_open_clip(state)))
    fitting = []
    for name in open_clip.list_models():
        config = open_clip.get_model_config(name)
        text = {"vocab_size": open_clip.CLIPTextCfg.vocab_size, "width": open_clip.CLIPTextCfg.width}
        text |= config["text_cfg"]
        # Before anything is built: a text tower of another size, or one that lives on the hub.
        if shapes.get("text.token_embedding.weight") != (text["vocab_size"], text["width"]) or "hf_model_name" in text:
            continue
        if shapes.get("text.text_projection", (0, config["embed_dim"]))[1] != config["embed_dim"]:
            continue
        if config.get("quick_gelu", False) or not quick_gelu:
            with torch.device("meta"):
                own = _build(config).state_dict()
            if _shapes(own) == shapes:
                fitting.append(name)
    return fitting


def _shapes(state: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    towers = {key: tuple(weight.shape) for key, weight in state.items() if key.startswith(("visual.", "text."))}
    towers.pop("text.positional_embedding", None)
    return towers
