"""Finds the architecture, the preprocessing and the weights of a CLIP, given a name, a folder or a file.

Names and weights that do not fit each other raise a ValueError that lists what would fit, before anything is trained.
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
    """Return the folder of open_clip or transformers that `backbone.name` means; None if it is an architecture."""
    if name.startswith("hf-hub:"):
        return _hub_folder(name.removeprefix("hf-hub:"), "*.json", "*.txt", "*.model")
    folder = Path(name.removeprefix("local-dir:")).expanduser()
    if (folder / CONFIG_FILE).is_file() or (folder / TRANSFORMERS_FILE).is_file():
        return folder
    if folder.is_dir() or name.startswith("local-dir:"):
        raise ValueError(
            f"backbone.name={name} is not the folder of a CLIP, because it has neither {CONFIG_FILE} (open_clip) nor "
            f"{TRANSFORMERS_FILE} (transformers): set it to such a folder or to an architecture of open_clip."
        )
    return None


def find_config(name: str, folder: Path | None, pretrained: str | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the configs of the architecture and of the preprocessing, from the folder or from open_clip."""
    if folder and (folder / CONFIG_FILE).is_file():
        described = json.loads((folder / CONFIG_FILE).read_text())
        return described["model_cfg"], asdict(PreprocessCfg(**described.get("preprocess_cfg", {})))
    if folder:
        return _transformers_config(name, folder)
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
        raise ValueError(f"The weights {pretrained} were trained with the other GELU: set backbone.name={other}.")
    # A file of weights has no mean and deviation, so take those that all published weights of the architecture share.
    shared: dict[str, Any] = tag or next(iter(tags.values()), {})
    if not tag and any(other["mean"] != shared["mean"] or other["std"] != shared["std"] for other in tags.values()):
        shared = {}
    return config, merge_preprocess_dict(PreprocessCfg(), shared)


def _transformers_config(name: str, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the configs of the architecture and of the preprocessing of a transformers folder.

    Departs: for SigLIP, open_clip computes exact GELU, where transformers uses the tanh approximation (except in the
    text tower of SigLIP 2). Features are those of open_clip.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False).to_dict()
    except (OSError, ValueError) as error:  # a model that needs code of its own, or a damaged file
        raise ValueError(
            f"backbone.name={name}: its {TRANSFORMERS_FILE} is none of a model of transformers ({_first_line(error)}), "
            "and no code of a folder is run: set it to the folder of a CLIPModel or SiglipModel."
        ) from error
    kind = config.get("model_type")
    if kind == "clip":
        try:
            described = convert.clip_architecture(config)
        except ValueError as error:
            raise ValueError(f"backbone.name={name} has no equivalent in open_clip: {error}") from error
    elif kind == "siglip":
        candidates = {
            other: open_clip.get_model_config(other) for other in open_clip.list_models() if "SigLIP" in other
        }
        matching = [other for other in candidates.values() if convert.is_siglip_of(config, other)]
        if not matching:
            raise ValueError(
                f"backbone.name={name} has no equivalent in open_clip: choose from {', '.join(candidates)}."
            )
        described = matching[0]
    else:
        raise ValueError(
            f"backbone.name={name} is a transformers folder of the model type {kind}: set it to one of clip or siglip."
        )
    # transformers 5 writes the settings of the image processor into the file of the whole processor.
    files = [folder / "preprocessor_config.json", folder / "processor_config.json"]
    images: dict[str, Any] = next((json.loads(file.read_text()) for file in files if file.is_file()), {})
    images = images.get("image_processor", images)
    if "image_mean" not in images:
        raise ValueError(
            f"backbone.name={name} has no mean and deviation of its images: copy preprocessor_config.json into it, "
            "from the folder of the model that it was made from."
        )
    return described, asdict(PreprocessCfg(mean=tuple(images["image_mean"]), std=tuple(images["image_std"])))


def build_model(config: dict[str, Any]) -> open_clip.CustomTextCLIP:
    """Return a model with random weights and separate `.visual` and `.text` towers, for any architecture."""
    config = deepcopy(config)
    config.pop("custom_text", None)
    if "timm_model_name" in config["vision_cfg"]:
        config["vision_cfg"]["timm_model_pretrained"] = False
    if "hf_model_name" in config["text_cfg"]:
        config["text_cfg"]["hf_model_pretrained"] = False
    return (open_clip.CoCa if "multimodal_cfg" in config else open_clip.CustomTextCLIP)(**config)


# -- the tokenizer -----------------------------------------------------------------------------------------------------


def load_tokenizer(
    name: str, folder: Path | None, text: Mapping[str, Any], context_length: int
) -> SimpleTokenizer | HFTokenizer:
    """Return the tokenizer of a text tower: CLIP's, or the one in the folder or on the hub."""
    options = text.get("tokenizer_kwargs", {})
    if (repo := text.get("hf_tokenizer_name")) is None:
        _check_vocabulary(name, folder)
        return SimpleTokenizer(context_length=context_length, **options)
    source = folder if folder and list(folder.glob("tokenizer*")) else _hub_folder(repo, "*tokenizer*")
    try:
        return HFTokenizer(str(source), context_length=context_length, **{**options, "trust_remote_code": False})
    except (OSError, ValueError) as error:
        raise ValueError(
            f"backbone.name={name}: the tokenizer in {source} cannot be loaded ({_first_line(error)}). No code of a "
            "folder is run: set backbone.name to a model with a tokenizer of transformers."
        ) from error


def _check_vocabulary(name: str, folder: Path | None) -> None:
    """Raise ValueError if a transformers folder has a vocabulary that differs from CLIP's."""
    if folder is None or (folder / CONFIG_FILE).is_file():
        return
    if (folder / "vocab.json").is_file():
        words = json.loads((folder / "vocab.json").read_text())
    elif (folder / "tokenizer.json").is_file():
        words = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    else:
        raise ValueError(f"backbone.name={name} has no tokenizer: copy tokenizer.json or vocab.json into the folder.")
    start = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    if words != {start.get(word, word): number for word, number in SimpleTokenizer().encoder.items()}:
        raise ValueError(
            f"backbone.name={name} has a vocabulary that differs from CLIP's, which is not supported: set it to a "
            "model with CLIP's vocabulary."
        )


# -- the weights -------------------------------------------------------------------------------------------------------


def find_weights(name: str, folder: Path | None, pretrained: str | None) -> Path | None:
    """Return the file that `backbone.pretrained` means; None for random weights."""
    if pretrained == "random" or (pretrained is None and folder is None):
        return None
    if pretrained is None:
        return _hub_weights(name.removeprefix("hf-hub:")) if name.startswith("hf-hub:") else _folder_weights(folder)
    path = Path(pretrained).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        raise ValueError(
            f"backbone.pretrained={pretrained} is a folder with an architecture of its own: set "
            f"backbone.name={pretrained} backbone.pretrained=null."
        )
    tag = open_clip.get_pretrained_cfg(name, pretrained)
    if not tag:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
        hint = " To load the weights in the folder, set backbone.pretrained=null." if folder else ""
        raise ValueError(
            f"backbone.pretrained={pretrained} is neither a file nor a tag of {name}. Its tags: {tags}.{hint}"
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
        if files := sorted(folder.glob(pattern)):
            return files[0]
    raise ValueError(
        f"{folder} has none of the files {', '.join(patterns)}. For random weights, set backbone.pretrained=random."
    )


def _hub_weights(repo: str) -> Path:
    """Return the local copy of the weights `org/name/` or `org/name/file` on the hub; safetensors are preferred."""
    owner, project, file = [*repo.split("/"), ""][:3]
    for candidate in (file,) if file else (*WEIGHT_FILES, *TRANSFORMERS_WEIGHTS):
        if files := sorted(_hub_folder(f"{owner}/{project}", candidate).glob(candidate)):
            return files[0]
    raise ValueError(f"{repo} has no weights of a CLIP. Download some and set backbone.pretrained=/path/to/file.")


def _hub_folder(repo: str, *patterns: str) -> Path:
    """Return the local folder with some files of a hub repository, from the cache or the network.

    Without a network, `snapshot_download` fails within a second; the download of open_clip retries for a minute.
    """
    try:
        return Path(huggingface_hub.snapshot_download(repo, allow_patterns=list(patterns)))
    except (LocalEntryNotFoundError, HfHubHTTPError) as error:
        raise ValueError(_unfetchable(repo, error)) from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _unfetchable(source: str, error: Exception) -> str:
    reason = str(error).splitlines()[0]
    return (
        f"Cannot fetch {source} ({reason}). Set backbone.pretrained=/path/to/file for weights in a local file, or "
        "backbone.name=/path/to/folder for a folder of open_clip or transformers."
    )


def read_weights(path: Path, name: str, config: dict[str, Any]) -> dict[str, Tensor]:
    """Return the weights in a file, by the names of a model with separate towers.

    Raises:
        ValueError: if the file cannot be read as a CLIP, or was trained with another GELU than the config has.
    """
    stored = convert.read(path)
    if convert.uses_quick_gelu(stored) and not config.get("quick_gelu", False):
        other = next(iter(matching_architectures(stored, quick_gelu=True)), f"{name}-quickgelu")
        raise ValueError(f"{path} was trained with QuickGELU, like OpenAI's weights: set backbone.name={other}.")
    try:
        return convert_to_custom_text_state_dict(convert.to_open_clip(stored))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def assign_weights(module: nn.Module, state: Mapping[str, Tensor], strict: bool = True) -> list[str]:
    """Assign tensors as the weights of a module, and return the names that the module does not have.

    Tensors are not copied, so that a file that is mapped into memory is not held twice. Only tensors of another dtype
    are copied into the module's weights.
    """
    current = module.state_dict()
    to_cast = {key for key in current.keys() & state.keys() if state[key].dtype != current[key].dtype}
    weights = {key: current[key].copy_(weight) if key in to_cast else weight for key, weight in state.items()}
    return module.load_state_dict(weights, strict, assign=True).unexpected_keys


def load_weights(model: open_clip.CustomTextCLIP, state: dict[str, Tensor], path: Path | None, name: str) -> None:
    """Load a checkpoint into a model, strictly. The loader of open_clip would stretch position tables silently.

    Raises:
        ValueError: if names or shapes differ from those of the model.
    """
    state = convert_to_custom_text_state_dict(convert_state_dict(model, state))
    expected = model.state_dict()
    for key in ("logit_scale", "logit_bias"):  # (1,) in some published files
        if key in state and key in expected:
            state[key] = state[key].reshape(expected[key].shape)
    wrong = [key for key, weight in expected.items() if key in state and state[key].shape != weight.shape]
    if wrong == ["text.positional_embedding"]:
        rows, length = len(state[wrong[0]]), len(expected[wrong[0]])
        raise ValueError(
            f"{path}: {wrong[0]} has {rows} rows, {name} expects {length}: set backbone.context_length={rows}."
        )
    if wrong:
        shapes = f"{wrong[0]} is {tuple(state[wrong[0]].shape)}, {name} expects {tuple(expected[wrong[0]].shape)}"
        choices = " or ".join(matching_architectures(state)) or "the architecture that was trained, or a folder of it"
        raise ValueError(f"{path} has another architecture: {shapes}. Set backbone.name={choices}.")
    try:
        assign_weights(model, state)
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit backbone.name={name}: {error}") from error


def matching_architectures(state: dict[str, Tensor], quick_gelu: bool = False) -> list[str]:
    """Return the architectures of open_clip with weights of these shapes; only the context length may differ.

    Args:
        state: the weights, in any layout that `convert.py` reads.
        quick_gelu: only return architectures with QuickGELU.
    """
    shapes = _shapes(convert_to_custom_text_state_dict(convert.to_open_clip(state)))
    matching = []
    for name in open_clip.list_models():
        config = open_clip.get_model_config(name)
        text = {"vocab_size": open_clip.CLIPTextCfg.vocab_size, "width": open_clip.CLIPTextCfg.width}
        text |= config["text_cfg"]
        # Skip those with another text tower, or one from the hub, before a model is built.
        if shapes.get("text.token_embedding.weight") != (text["vocab_size"], text["width"]) or "hf_model_name" in text:
            continue
        if shapes.get("text.text_projection", (0, config["embed_dim"]))[1] != config["embed_dim"]:
            continue
        if config.get("quick_gelu", False) or not quick_gelu:
            with torch.device("meta"):
                candidate = build_model(config).state_dict()
            if _shapes(candidate) == shapes:
                matching.append(name)
    return matching


def _shapes(state: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    towers = {key: tuple(weight.shape) for key, weight in state.items() if key.startswith(("visual.", "text."))}
    towers.pop("text.positional_embedding", None)
    return towers
