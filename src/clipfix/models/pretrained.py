"""Which CLIP: a name, a folder or a file in; its architecture, its preprocessing and its weights out.

Whatever does not fit is refused here with what would, before anything is trained.
"""

import json
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from typing import Any

import huggingface_hub
import open_clip
import torch
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from open_clip.convert import convert_state_dict
from open_clip.model import convert_to_custom_text_state_dict
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
from open_clip.transform import PreprocessCfg, merge_preprocess_dict
from torch import Tensor, nn

from clipfix.models import convert

CONFIG_FILE, TRANSFORMERS_FILE = "open_clip_config.json", "config.json"
WEIGHT_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
TRANSFORMERS_WEIGHTS = ("model.safetensors", "model-00001-of-*.safetensors", "pytorch_model.bin")

# -- the architecture --------------------------------------------------------------------------------------------------


def find_folder(name: str) -> Path | None:
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


def describe(name: str, folder: Path | None, pretrained: str | None) -> tuple[dict[str, Any], dict[str, Any]]:
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


def build(config: dict[str, Any]) -> open_clip.CustomTextCLIP:
    """An untrained model with separate `.visual` and `.text` towers, whatever the architecture."""
    config = deepcopy(config)
    config.pop("custom_text", None)
    if "timm_model_name" in config["vision_cfg"]:
        config["vision_cfg"]["timm_model_pretrained"] = False
    if "hf_model_name" in config["text_cfg"]:
        config["text_cfg"]["hf_model_pretrained"] = False
    return (open_clip.CoCa if "multimodal_cfg" in config else open_clip.CustomTextCLIP)(**config)


# -- the tokenizer -----------------------------------------------------------------------------------------------------


def tokenizer(
    name: str, folder: Path | None, text: Mapping[str, Any], context_length: int
) -> SimpleTokenizer | HFTokenizer:
    """What makes ids of texts for this text tower: CLIP's own, or that of the folder or of the hub."""
    options = text.get("tokenizer_kwargs", {})
    if (repo := text.get("hf_tokenizer_name")) is None:
        _check_vocabulary(name, folder)
        return SimpleTokenizer(context_length=context_length, **options)
    source = folder if folder and list(folder.glob("tokenizer*")) else _hub_folder(repo, "*tokenizer*")
    return HFTokenizer(str(source), context_length=context_length, **options)


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


# -- the weights -------------------------------------------------------------------------------------------------------


def find_weights(name: str, folder: Path | None, pretrained: str | None) -> Path | None:
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


def read(path: Path, name: str, config: dict[str, Any]) -> dict[str, Tensor]:
    """The weights in a file under the names of a model with two towers."""
    stored = convert.read(path)
    if convert.wants_quick_gelu(stored) and not config.get("quick_gelu", False):
        other = next(iter(fitting(stored, quick_gelu=True)), f"{name}-quickgelu")
        raise ValueError(f"{path} holds weights made from OpenAI's, trained with QuickGELU: use backbone.name={other}.")
    try:
        return convert_to_custom_text_state_dict(convert.to_open_clip(stored))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def assign(module: nn.Module, state: Mapping[str, Tensor], strict: bool = True) -> list[str]:
    """Puts tensors in the place of a module's own; gives the names that it does not have.

    Large files are mapped into memory, so that a model is there once and not twice. Only what has another type than the
    module's is copied, into what the module has.
    """
    own = module.state_dict()
    other = {key for key in own.keys() & state.keys() if state[key].dtype != own[key].dtype}
    taken = {key: own[key].copy_(weight) if key in other else weight for key, weight in state.items()}
    return module.load_state_dict(taken, strict, assign=True).unexpected_keys


def fill(model: open_clip.CustomTextCLIP, state: dict[str, Tensor], path: Path | None, name: str) -> None:
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
        choices = " or ".join(fitting(state)) or "the architecture that it was trained as, or a folder of it"
        raise ValueError(f"{path} is another architecture: {shapes}. Choose backbone.name={choices}.")
    try:
        assign(model, state)
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit backbone.name={name}: {error}") from error


def fitting(state: dict[str, Tensor], quick_gelu: bool = False) -> list[str]:
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
                own = build(config).state_dict()
            if _shapes(own) == shapes:
                fitting.append(name)
    return fitting


def _shapes(state: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    towers = {key: tuple(weight.shape) for key, weight in state.items() if key.startswith(("visual.", "text."))}
    towers.pop("text.positional_embedding", None)
    return towers
