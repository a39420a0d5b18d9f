"""Other people's weight files as open_clip's: which layout a file has, and the same weights under open_clip's names.

Pure functions, a state dict in and one out; tensors are renamed, joined or transposed, never computed anew. What each
layout looks like was read in the code that writes it:

- DIVA (github.com/baaivision/DIVA, run_DIVA_with_*.py): `torch.save(trainer.model.state_dict())` of the whole training
  model. The CLIP is under `class_model.model.`, OpenAI's or open_clip's own names behind it; beside it lie `vae.`,
  `unet.`, `text_encoder.`, `visual_proj.` and `class_model.final_fc.`, in fp32. The released OpenAI-ViT-L-14-*.pth are
  a plain CLIP without that prefix: public code loads them by OpenAI's `clip` (model.load_state_dict, build_model). The
  other released files could not be looked into; either layout is read.
- Long-CLIP (github.com/beichenzbc/Long-CLIP, train/train.py): `torch.save(model.module.state_dict())`, OpenAI's names
  without a prefix, and a second position table, `positional_embedding_res`; its masks are no part of the file.
- transformers: `CLIPModel` and `SiglipModel`, whose names are those of their `save_pretrained`.
- OpenAI's archives and everything of open_clip's: as they are.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import ZipFile, is_zipfile

import torch
from safetensors.torch import load_file
from torch import Tensor

State = dict[str, Tensor]

# The three integers that an OpenAI archive carries beside its weights: the mark by which such a file is recognized.
OPENAI_MARKS = ("input_resolution", "context_length", "vocab_size")
DIVA = "class_model.model."
SECOND_TABLE = "positional_embedding_res"
KEPT_ROWS = 20  # of Long-CLIP's first table; `mask1` and `mask2` of its model/model_longclip.py

# Beginnings of names, transformers' to open_clip's. Blocks are listed apart; they keep their numbers.
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
# Names within a block: open_clip's own, and timm's, which SigLIP's picture tower has.
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
    """Weights from a file, or from the parts of one, without running code from it; wrappers of training code are shed.

    The one exception is OpenAI's TorchScript archive, which only `torch.jit.load` opens: it builds the archived
    program, of which nothing but the tensors is used.
    """
    if path.suffix == ".safetensors":
        # A file too large for one is model-00001-of-00002.safetensors and so on.
        pattern = re.sub(r"-\d{5}-of-", "-*-of-", path.name)
        return {name: weight for part in sorted(path.parent.glob(pattern)) for name, weight in load_file(part).items()}
    if is_zipfile(path) and any("/code/" in member for member in ZipFile(path).namelist()):
        return torch.jit.load(path, map_location="cpu").state_dict()
    try:
        # What is asked for is read from the disk, and DIVA's generator beside the CLIP is not.
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))
    except UnpicklingError as error:
        raise ValueError(
            f"{path} holds Python objects, and only tensors are read (weights only). If you trust the file, "
            "write its weights alone where its code is installed: "
            "torch.save(torch.load(path, weights_only=False).state_dict(), 'weights.pt')"
        ) from error
    except (RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"{path} is damaged ({str(error).splitlines()[0]}): fetch or write it again.") from error
    state = state.get("state_dict", state)
    return {key.removeprefix("module."): value for key, value in state.items()}


def to_open_clip(state: Mapping[str, Tensor]) -> State:
    """The weights of a CLIP under open_clip's names, from any layout above; refused where no layout fits.

    A plain CLIP has OpenAI's names (`visual.`, `transformer.`, ...), SigLIP open_clip's (`visual.trunk.`, `text.`).
    """
    state = dict(state)
    if any(key.startswith("backbone.model.") for key in state):
        raise ValueError("it is a checkpoint of clipfix, which holds only what was trained: give it as checkpoint=...")
    if any(key.startswith(DIVA) for key in state):
        state = {key.removeprefix(DIVA): value for key, value in state.items() if key.startswith(DIVA)}
    if SECOND_TABLE in state:
        state = with_one_table(state)
    if "vision_model.head.probe" in state:
        state = from_siglip(state)
    elif "visual_projection.weight" in state and "text_projection.weight" in state:
        state = from_clip(state)
    if not any(key.startswith(("visual.", "image_encoder.")) for key in state):  # the latter is MobileCLIP's
        found = ", ".join(dict.fromkeys(key.split(".")[0] for key in state)) or "nothing"
        raise ValueError(
            f"it has no CLIP in a known layout (open_clip, OpenAI, transformers' CLIPModel or SiglipModel, DIVA, "
            f"Long-CLIP): its names begin with {found}."
        )
    return {key: value for key, value in state.items() if key not in OPENAI_MARKS}


def wants_quick_gelu(state: Mapping[str, Tensor]) -> bool:
    """Whether a file, as it was read, is known to be trained with QuickGELU: OpenAI's, and what is made of them.

    DIVA repairs OpenAI's, MetaCLIP's and DFN's, all with it, and SigLIP's, whose tower has other names.
    """
    return any(key in state for key in (*OPENAI_MARKS, SECOND_TABLE, f"{DIVA}visual.conv1.weight"))


def with_one_table(state: Mapping[str, Tensor]) -> State:
    """Long-CLIP's two position tables as the one that its `encode_text` adds: rows of the first, then of the second."""
    state = dict(state)
    state["positional_embedding"] = torch.cat(
        [state["positional_embedding"][:KEPT_ROWS], state.pop(SECOND_TABLE)[KEPT_ROWS:]]
    )
    return state


def from_clip(state: Mapping[str, Tensor]) -> State:
    """A transformers `CLIPModel`."""
    state = {renamed(key, CLIP_NAMES, CLIP_BLOCK): value for key, value in joined(state).items()}
    return state | {key: state[key].T.contiguous() for key in ("visual.proj", "text_projection")}


def from_siglip(state: Mapping[str, Tensor]) -> State:
    """A transformers `SiglipModel`, whose picture tower open_clip takes from timm."""
    state = joined(state)
    pool: State = {}
    for kind in ("weight", "bias"):
        query, *rest = state.pop(f"vision_model.head.attention.in_proj_{kind}").chunk(3)
        pool |= {f"visual.trunk.attn_pool.q.{kind}": query, f"visual.trunk.attn_pool.kv.{kind}": torch.cat(rest)}
    state = {
        renamed(key, SIGLIP_NAMES, TIMM_BLOCK if key.startswith("vision_model.") else CLIP_BLOCK): value
        for key, value in state.items()
    }
    state["visual.trunk.pos_embed"] = state["visual.trunk.pos_embed"][None]
    return state | {key: value.clone() for key, value in pool.items()}


def joined(state: Mapping[str, Tensor]) -> State:
    """Query, key and value of each block as one matrix; without the position numbers that old files store."""
    state = {key: value for key, value in state.items() if not key.endswith("position_ids")}
    for key in [key for key in state if ".q_proj." in key]:
        parts = [state.pop(key.replace(".q_proj.", f".{part}_proj.")) for part in "qkv"]
        state[key.replace(".q_proj.", ".in_proj_")] = torch.cat(parts)
    return state


def renamed(key: str, names: Mapping[str, str], block: Mapping[str, str]) -> str:
    """A weight's name by the tables, in either direction; one that none has stays, and loading calls it unexpected."""
    for theirs, ours in names.items():
        if key.startswith(theirs):
            number, dot, rest = key.removeprefix(theirs).partition(".")
            if theirs.endswith((".layers.", "blocks.")):
                begin = next((begin for begin in block if rest.startswith(begin)), "")
                rest = block.get(begin, "") + rest.removeprefix(begin)
            return ours + number + dot + rest
    return key


def clip_architecture(config: Mapping[str, Any]) -> dict[str, Any]:
    """open_clip's description of a transformers `CLIPConfig`, as a dictionary with its defaults filled in."""
    vision, text = config["vision_config"], config["text_config"]
    if vision["hidden_act"] != text["hidden_act"] or text["hidden_act"] not in ("gelu", "quick_gelu"):
        raise ValueError(
            f"its towers compute {vision['hidden_act']} and {text['hidden_act']}; open_clip's compute "
            "both gelu or both quick_gelu."
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
    if (
        int(width * ratio) != inner
    ):  # open_clip cuts the product, which may fall short of the whole number by a rounding
        ratio = math.nextafter(ratio, math.inf)
    tower = {"width": width, "layers": config["num_hidden_layers"], "mlp_ratio": ratio}
    return tower if config["layer_norm_eps"] == 1e-5 else tower | {"norm_kwargs": {"eps": config["layer_norm_eps"]}}


def is_siglip_of(config: Mapping[str, Any], architecture: Mapping[str, Any]) -> bool:
    """Whether an open_clip architecture is that of a transformers `SiglipConfig`, as a dictionary with its defaults."""
    vision, text = config["vision_config"], config["text_config"]
    their_vision, their_text = architecture["vision_cfg"], architecture["text_cfg"]
    return (
        f"_patch{vision['patch_size']}_siglip_" in their_vision.get("timm_model_name", "")
        and their_vision["image_size"] == vision["image_size"]
        and architecture["embed_dim"] == vision["hidden_size"]
        and {**text, **their_text}.items()
        >= {
            "context_length": text["max_position_embeddings"],
            "vocab_size": text["vocab_size"],
            "width": text["hidden_size"],
            "layers": text["num_hidden_layers"],
            "heads": text["num_attention_heads"],
        }.items()
    )
