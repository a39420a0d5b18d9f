"""Converts weight files of other projects to the names of open_clip.

The functions take a state dict and return one. Tensors are renamed, concatenated or transposed, and their values do not
change. The layouts were read from the code that writes them:

- DIVA (github.com/baaivision/DIVA, run_DIVA_with_*.py): `torch.save(trainer.model.state_dict())` of the whole training
  model. The CLIP has the prefix `class_model.model.`, followed by the names of OpenAI or open_clip; there are also
  `vae.`, `unet.`, `text_encoder.`, `visual_proj.` and `class_model.final_fc.`, in fp32. The released
  OpenAI-ViT-L-14-*.pth are a plain CLIP without that prefix: public code loads them with OpenAI's `clip`
  (model.load_state_dict, build_model). The other released files were not available; both layouts are read.
- Long-CLIP (github.com/beichenzbc/Long-CLIP, train/train.py): `torch.save(model.module.state_dict())`, OpenAI's names
  without a prefix, and a second position table, `positional_embedding_res`; the file does not have its masks.
- transformers: `CLIPModel` and `SiglipModel`, with the names that their `save_pretrained` writes.
- OpenAI's archives and files of open_clip: their names do not change.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import is_zipfile

import torch
from safetensors.torch import load_file
from torch import Tensor

from clipfix.models import torchscript

State = dict[str, Tensor]

# Three integers in OpenAI's archives beside the weights, by which such a file is recognized.
OPENAI_INTEGERS = ("input_resolution", "context_length", "vocab_size")
DIVA = "class_model.model."
SECOND_TABLE = "positional_embedding_res"
KEPT_ROWS = 20  # rows used of Long-CLIP's first table: `mask1` and `mask2` in its model/model_longclip.py

# Prefixes of names, from transformers to open_clip. Names within a block are below; blocks keep their numbers.
CLIP_NAMES = {
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.pre_layrnorm.": "visual.ln_pre.",
    "vision_model.encoder.layers.": "visual.transformer.resblocks.",
    "vision_model.post_layernorm.": "visual.ln_post.",
    "visual_projection.weight": "visual.proj",
    "text_model.embeddings.token_embedding.": "token_embedding.",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.encoder.layers.": "transformer.resblocks.",
    "text_model.final_layer_norm.": "ln_final.",
    "text_projection.weight": "text_projection",
    "logit_scale": "logit_scale",
}
SIGLIP_NAMES = {
    "vision_model.embeddings.patch_embedding.": "visual.trunk.patch_embed.proj.",
    "vision_model.embeddings.position_embedding.weight": "visual.trunk.pos_embed",
    "vision_model.encoder.layers.": "visual.trunk.blocks.",
    "vision_model.post_layernorm.": "visual.trunk.norm.",
    "vision_model.head.probe": "visual.trunk.attn_pool.latent",
    "vision_model.head.attention.out_proj.": "visual.trunk.attn_pool.proj.",
    "vision_model.head.layernorm.": "visual.trunk.attn_pool.norm.",
    "vision_model.head.mlp.": "visual.trunk.attn_pool.mlp.",
    "text_model.embeddings.token_embedding.": "text.token_embedding.",
    "text_model.embeddings.position_embedding.weight": "text.positional_embedding",
    "text_model.encoder.layers.": "text.transformer.resblocks.",
    "text_model.final_layer_norm.": "text.ln_final.",
    "text_model.head.": "text.text_projection.",
    "logit_scale": "logit_scale",
    "logit_bias": "logit_bias",
}
# Names within a block of open_clip, and of timm, which has SigLIP's visual tower.
CLIP_BLOCK = {
    "self_attn.in_proj_": "attn.in_proj_",
    "self_attn.out_proj.": "attn.out_proj.",
    "layer_norm1.": "ln_1.",
    "layer_norm2.": "ln_2.",
    "mlp.fc1.": "mlp.c_fc.",
    "mlp.fc2.": "mlp.c_proj.",
}
TIMM_BLOCK = {
    "self_attn.in_proj_": "attn.qkv.",
    "self_attn.out_proj.": "attn.proj.",
    "layer_norm1.": "norm1.",
    "layer_norm2.": "norm2.",
    "mlp.": "mlp.",
}


def read(path: Path) -> State:
    """Return the weights in a file, or in all parts of a file in parts, without running code from it.

    Wrappers of training code (`state_dict`, `module.`) are removed. Of TorchScript archives, such as OpenAI's, only the
    tensors are read.

    Raises:
        ValueError: if the file is damaged or has Python objects other than tensors.
    """
    if path.suffix == ".safetensors":
        # Parts of a large file are named model-00001-of-00002.safetensors and so on.
        pattern = re.sub(r"-\d{5}-of-", "-*-of-", path.name)
        return {name: weight for part in sorted(path.parent.glob(pattern)) for name, weight in load_file(part).items()}
    if is_zipfile(path) and torchscript.is_archive(path):
        return torchscript.read(path)
    try:
        # With mmap, only tensors that are used are read from the disk, and not DIVA's generator, for example.
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))
    except UnpicklingError as error:
        raise ValueError(
            f"{path} contains Python objects, but only tensors are read (weights only). If you trust the file, "
            "write its weights to another file where its code is installed: "
            "torch.save(torch.load(path, weights_only=False).state_dict(), 'weights.pt')"
        ) from error
    except (RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"{path} is damaged ({str(error).splitlines()[0]}): download or write it again.") from error
    state = state.get("state_dict", state)
    return {key.removeprefix("module."): value for key, value in state.items()}


def to_open_clip(state: Mapping[str, Tensor]) -> State:
    """Return the weights of a CLIP by open_clip's names, from any of the layouts above.

    A plain CLIP has OpenAI's names (`visual.`, `transformer.`, ...). SigLIP has those of open_clip (`visual.trunk.`,
    `text.`).

    Raises:
        ValueError: if the weights have none of these layouts.
    """
    state = dict(state)
    if any(key.startswith("backbone.model.") for key in state):
        raise ValueError(
            "it is a checkpoint of clipfix, which has trained weights only. To score or export it, set checkpoint=... "
            "to it; to train from its weights, export it first: run=export checkpoint=... to=open_clip"
        )
    if any(key.startswith(DIVA) for key in state):
        state = {key.removeprefix(DIVA): value for key, value in state.items() if key.startswith(DIVA)}
    if SECOND_TABLE in state:
        state = join_position_tables(state)
    if "vision_model.head.probe" in state:
        state = from_siglip(state)
    elif "visual_projection.weight" in state and "text_projection.weight" in state:
        state = from_clip(state)
    if not any(key.startswith(("visual.", "image_encoder.")) for key in state):  # the latter is MobileCLIP's
        prefixes = ", ".join(dict.fromkeys(key.split(".")[0] for key in state)) or "nothing"
        raise ValueError(
            f"it has no CLIP in a known layout (open_clip, OpenAI, transformers' CLIPModel or SiglipModel, DIVA, "
            f"Long-CLIP): its names begin with {prefixes}."
        )
    return {key: value for key, value in state.items() if key not in OPENAI_INTEGERS}


def uses_quick_gelu(state: Mapping[str, Tensor]) -> bool:
    """Return whether the weights of a file, before conversion, are known to be trained with QuickGELU.

    These are OpenAI's weights and models trained from them. DIVA's models of OpenAI, MetaCLIP and DFN all have it; its
    SigLIP models do not, and their towers have other names.
    """
    return any(key in state for key in (*OPENAI_INTEGERS, SECOND_TABLE, f"{DIVA}visual.conv1.weight"))


def join_position_tables(state: Mapping[str, Tensor]) -> State:
    """Return Long-CLIP's weights with one position table: the first rows of one, then the rows of the other.

    This is the table that its `encode_text` adds to the tokens.
    """
    state = dict(state)
    state["positional_embedding"] = torch.cat(
        [state["positional_embedding"][:KEPT_ROWS], state.pop(SECOND_TABLE)[KEPT_ROWS:]]
    )
    return state


def from_clip(state: Mapping[str, Tensor]) -> State:
    """Return the weights of a transformers `CLIPModel` by open_clip's names."""
    state = {rename_weight(key, CLIP_NAMES, CLIP_BLOCK): value for key, value in join_qkv(state).items()}
    return state | {key: state[key].T.contiguous() for key in ("visual.proj", "text_projection")}


def from_siglip(state: Mapping[str, Tensor]) -> State:
    """Return the weights of a transformers `SiglipModel` by open_clip's names; its visual tower is timm's."""
    state = join_qkv(state)
    pool: State = {}
    for kind in ("weight", "bias"):
        query, *rest = state.pop(f"vision_model.head.attention.in_proj_{kind}").chunk(3)
        pool |= {f"visual.trunk.attn_pool.q.{kind}": query, f"visual.trunk.attn_pool.kv.{kind}": torch.cat(rest)}
    state = {
        rename_weight(key, SIGLIP_NAMES, TIMM_BLOCK if key.startswith("vision_model.") else CLIP_BLOCK): value
        for key, value in state.items()
    }
    state["visual.trunk.pos_embed"] = state["visual.trunk.pos_embed"][None]
    return state | {key: value.clone() for key, value in pool.items()}


def join_qkv(state: Mapping[str, Tensor]) -> State:
    """Return weights with query, key and value of each block as one matrix, and without `position_ids` of old files."""
    state = {key: value for key, value in state.items() if not key.endswith("position_ids")}
    for key in [key for key in state if ".q_proj." in key]:
        parts = [state.pop(key.replace(".q_proj.", f".{part}_proj.")) for part in "qkv"]
        state[key.replace(".q_proj.", ".in_proj_")] = torch.cat(parts)
    return state


def rename_weight(key: str, names: Mapping[str, str], block: Mapping[str, str]) -> str:
    """Return the new name of a weight. A name that is not in the tables is returned unchanged.

    Args:
        key: the name.
        names: new prefixes by old ones; tables in either direction work.
        block: new prefixes by old ones, for names within a block.
    """
    for old, new in names.items():
        if key.startswith(old):
            number, dot, rest = key.removeprefix(old).partition(".")
            if old.endswith((".layers.", "blocks.")):
                prefix = next((prefix for prefix in block if rest.startswith(prefix)), "")
                rest = block.get(prefix, "") + rest.removeprefix(prefix)
            return new + number + dot + rest
    return key


def clip_architecture(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return open_clip's config for a transformers `CLIPConfig`, given as a dictionary with its defaults.

    Raises:
        ValueError: if open_clip has no activation function for it.
    """
    vision, text = config["vision_config"], config["text_config"]
    if vision["hidden_act"] != text["hidden_act"] or text["hidden_act"] not in ("gelu", "quick_gelu"):
        raise ValueError(
            f"its towers have the activations {vision['hidden_act']} and {text['hidden_act']}; in open_clip, both "
            "towers have gelu, or both have quick_gelu."
        )
    return {
        "embed_dim": config["projection_dim"],
        "quick_gelu": text["hidden_act"] == "quick_gelu",
        "vision_cfg": {
            "image_size": vision["image_size"],
            "patch_size": vision["patch_size"],
            "head_width": vision["hidden_size"] // vision["num_attention_heads"],
            **_tower(vision),
        },
        "text_cfg": {
            "context_length": text["max_position_embeddings"],
            "vocab_size": text["vocab_size"],
            "heads": text["num_attention_heads"],
            **_tower(text),
        },
    }


def _tower(config: Mapping[str, Any]) -> dict[str, Any]:
    width, inner = config["hidden_size"], config["intermediate_size"]
    ratio = inner / width
    if int(width * ratio) != inner:  # open_clip truncates the product, which rounding may make too small
        ratio = math.nextafter(ratio, math.inf)
    tower = {"width": width, "layers": config["num_hidden_layers"], "mlp_ratio": ratio}
    return tower if config["layer_norm_eps"] == 1e-5 else tower | {"norm_kwargs": {"eps": config["layer_norm_eps"]}}


def is_siglip_of(config: Mapping[str, Any], architecture: Mapping[str, Any]) -> bool:
    """Return whether an open_clip config is that of a transformers `SiglipConfig`, a dictionary with its defaults."""
    vision, text = config["vision_config"], config["text_config"]
    clip_vision, clip_text = architecture["vision_cfg"], architecture["text_cfg"]
    return (
        f"_patch{vision['patch_size']}_siglip_" in clip_vision.get("timm_model_name", "")
        and clip_vision["image_size"] == vision["image_size"]
        and architecture["embed_dim"] == vision["hidden_size"]
        and {**text, **clip_text}.items()
        >= {
            "context_length": text["max_position_embeddings"],
            "vocab_size": text["vocab_size"],
            "width": text["hidden_size"],
            "layers": text["num_hidden_layers"],
            "heads": text["num_attention_heads"],
        }.items()
    )
