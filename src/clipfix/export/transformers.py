"""Files for transformers: `CLIPModel` or `SiglipModel`, whole or one tower.

Every weight has the name that `save_pretrained` of the whole model gives in transformers 4 (`text_model.`,
`vision_model.`). transformers 5 writes a single tower without these prefixes, and 4 then leaves it random with only a
warning, so the files are written here.
"""

from collections.abc import Mapping
from typing import Any

import torch
from open_clip.timm_model import TimmModel
from open_clip.tokenizer import SimpleTokenizer
from open_clip.transformer import ResidualAttentionBlock, TextTransformer, VisionTransformer
from torch import Tensor, nn

from clipfix.export.folder import Files, Weights
from clipfix.export.tokenizer import clip_files, hub_files
from clipfix.models.clip import Backbone
from clipfix.models.convert import CLIP_BLOCK, CLIP_NAMES, SIGLIP_NAMES, TIMM_BLOCK, State, rename_weight

INTERPOLATION = {"bilinear": 2, "bicubic": 3, "random": 3}  # Pillow's numbers
PROJECTIONS = ("visual_projection.weight", "text_projection.weight")  # (in, out) in open_clip
START, END = 49406, 49407  # the ids of CLIP's start and end token
ACTIVATIONS = {"QuickGELU": "quick_gelu", "GELU": "gelu", "GELUTanh": "gelu_pytorch_tanh"}


def files(backbone: Backbone) -> Files:
    """Return the files for `AutoModel`, `AutoProcessor`, `CLIPModel`, `SiglipModel`, and each tower alone."""
    state, config = model(backbone)
    config_and_weights: Files = {"config.json": config, "model.safetensors": Weights(state, in_parts=True)}
    return config_and_weights | tokenizer_files(backbone) | image_files(backbone)


def model(backbone: Backbone) -> tuple[State, dict[str, Any]]:
    """Return weights and config.json; raise ValueError if no class of transformers computes the same."""
    if isinstance(backbone.visual, TimmModel):
        return siglip(backbone)
    return clip(backbone)


# -- CLIP --------------------------------------------------------------------------------------------------------------


def clip(backbone: Backbone) -> tuple[State, dict[str, Any]]:
    """Return weights and config of a `CLIPModel`."""
    visual, text = clip_visual(backbone), clip_text(backbone)
    state = to_clip(backbone.model.state_dict())
    config = {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": backbone.embed_dim,
        "text_config": text,
        "vision_config": visual,
    }
    return checked(backbone, state, config), config


def clip_visual(backbone: Backbone) -> dict[str, Any]:
    """Return the `CLIPVisionConfig` of the visual tower."""
    tower: Any = backbone.visual
    if not isinstance(tower, VisionTransformer):
        raise refusal(backbone, f"its visual tower is a {type(tower).__name__}, and CLIPModel has a plain ViT")
    if tower.attn_pool is not None or tower.pool_type != "tok":
        raise refusal(backbone, "its visual tower pools all patches, and CLIPModel takes the class token")
    if not isinstance(tower.ln_pre, nn.LayerNorm):
        raise refusal(backbone, "its visual tower has no norm before the blocks, and CLIPModel has one")
    return {
        "model_type": "clip_vision_model",
        "image_size": backbone.image_size,
        "patch_size": tower.patch_size[0],
        "projection_dim": backbone.embed_dim,
        **blocks(backbone, tower.transformer.resblocks),
    }


def clip_text(backbone: Backbone) -> dict[str, Any]:
    """Return the `CLIPTextConfig` of the text tower.

    `eos_token_id` is the real end token. transformers then pools at its first position, as CLIP does, also if tokens
    are added to the vocabulary. OpenAI's own files have 2 there, which makes transformers pool at the largest id. That
    is the same, unless an added token, whose id is larger, is in the text.
    """
    tower = text_tower(backbone)
    plain = tower.attn_mask is not None and tower.cls_emb is None and tower.pool_type == "argmax"
    if not (plain and isinstance(tower.text_projection, nn.Parameter) and has_clip_words(backbone)):
        raise refusal(backbone, "its text tower is not causal, with CLIP's words and pooled at the end of the text")
    return {
        "model_type": "clip_text_model",
        "vocab_size": tower.vocab_size,
        "max_position_embeddings": len(tower.positional_embedding),
        "projection_dim": backbone.embed_dim,
        "bos_token_id": START,
        "eos_token_id": END,
        "pad_token_id": 1,  # transformers' default; no code reads it
        **blocks(backbone, tower.transformer.resblocks),
    }


def to_clip(state: Mapping[str, Tensor]) -> State:
    """The inverse of `convert.from_clip`, from the names of a model with two towers. Nothing is copied."""
    plain = {key.removeprefix("text."): value for key, value in state.items()}
    theirs = in_three(
        {rename_weight(key, reverse(CLIP_NAMES), reverse(CLIP_BLOCK)): value for key, value in plain.items()}
    )
    return {key: value.T if key in PROJECTIONS else value for key, value in theirs.items()}


# -- SigLIP ------------------------------------------------------------------------------------------------------------


def siglip(backbone: Backbone) -> tuple[State, dict[str, Any]]:
    """Return weights and config of a `SiglipModel`, with the exact GELU of these towers; the original approximates."""
    visual, text = siglip_visual(backbone), siglip_text(backbone)
    config = {
        "architectures": ["SiglipModel"],
        "model_type": "siglip",
        "text_config": text,
        "vision_config": visual,
    }
    state = to_siglip(backbone.model.state_dict())
    if "logit_bias" not in state:
        raise refusal(backbone, "it has no logit bias, and SiglipModel has one")
    state |= {key: state[key].reshape(1) for key in ("logit_scale", "logit_bias")}
    return checked(backbone, state, config), config


def siglip_visual(backbone: Backbone) -> dict[str, Any]:
    """Return the `SiglipVisionConfig` of the visual tower."""
    tower: Any = backbone.visual
    trunk = tower.trunk
    fits = (
        type(trunk).__name__ == "VisionTransformer"
        and getattr(trunk, "attn_pool", None) is not None
        and not len(tower.head)
        and trunk.cls_token is None
    )
    if not fits:
        name = backbone.config["vision_cfg"]["timm_model_name"]
        raise refusal(backbone, f"its visual tower, timm's {name}, is not SigLIP's, the only one of timm's there")
    config = blocks(backbone, trunk.blocks)
    if trunk.attn_pool.mlp.fc1.out_features != config["intermediate_size"]:
        raise refusal(backbone, "the pooling of its visual tower has another width than its blocks")
    return {
        "model_type": "siglip_vision_model",
        "image_size": backbone.image_size,
        "patch_size": trunk.patch_embed.patch_size[0],
        **config,
    }


def siglip_text(backbone: Backbone) -> dict[str, Any]:
    """Return the `SiglipTextConfig` of the text tower."""
    tower = text_tower(backbone)
    plain = tower.attn_mask is None and tower.cls_emb is None and tower.pool_type == "last"
    if not (plain and not tower.use_pad_mask and isinstance(tower.text_projection, nn.Linear)):
        raise refusal(backbone, "its text tower is not SigLIP's: all tokens see each other, the last is pooled")
    return {
        "model_type": "siglip_text_model",
        "vocab_size": tower.vocab_size,
        "max_position_embeddings": len(tower.positional_embedding),
        "projection_size": tower.text_projection.out_features,
        "bos_token_id": None,  # the defaults are CLIP's ids, which are outside of this vocabulary
        "eos_token_id": None,
        **blocks(backbone, tower.transformer.resblocks),
    }


def to_siglip(state: Mapping[str, Tensor]) -> State:
    """The inverse of `convert.from_siglip`. What is copied is small: the query, key and value of the pooling."""
    state = dict(state)
    pool: State = {}
    for kind in ("weight", "bias"):
        parts = [state.pop(f"visual.trunk.attn_pool.{part}.{kind}") for part in ("q", "kv")]
        pool[f"vision_model.head.attention.in_proj_{kind}"] = torch.cat(parts)
    theirs: State = {}
    for key, value in state.items():
        block = TIMM_BLOCK if key.startswith("visual.") else CLIP_BLOCK
        theirs[rename_weight(key, reverse(SIGLIP_NAMES), reverse(block))] = value
    theirs["vision_model.embeddings.position_embedding.weight"] = state["visual.trunk.pos_embed"][0]
    return in_three(theirs) | pool


# -- both --------------------------------------------------------------------------------------------------------------


def reverse(names: Mapping[str, str]) -> dict[str, str]:
    return {ours: theirs for theirs, ours in names.items()}


def in_three(state: State) -> State:
    """Split query, key and value of each block, as views."""
    apart: State = {}
    for key, value in state.items():
        if ".self_attn.in_proj_" in key:
            for part, third in zip("qkv", value.chunk(3), strict=True):
                apart[key.replace(".in_proj_", f".{part}_proj.")] = third
        else:
            apart[key] = value
    return apart


def blocks(backbone: Backbone, layers: Any) -> dict[str, Any]:
    """Return the sizes and the activation of a tower from its blocks, which are open_clip's own or timm's."""
    first = layers[0]
    if not (isinstance(first, ResidualAttentionBlock) or isinstance(getattr(first, "norm1", None), nn.LayerNorm)):
        raise refusal(backbone, f"its blocks, {type(first).__name__}, are not those of a plain transformer")
    if isinstance(first, ResidualAttentionBlock):
        norm, mlp, act = first.ln_1, first.mlp.c_fc, first.mlp.gelu
    else:
        norm, mlp, act = first.norm1, first.mlp.fc1, first.mlp.act
    name = "GELUTanh" if getattr(act, "approximate", "none") == "tanh" else type(act).__name__
    if name not in ACTIVATIONS:
        raise refusal(backbone, f"its blocks compute {name}, which is none of {', '.join(ACTIVATIONS)}")
    return {
        "hidden_size": norm.normalized_shape[0],
        "intermediate_size": mlp.out_features,
        "num_hidden_layers": len(layers),
        "num_attention_heads": first.attn.num_heads,
        "hidden_act": ACTIVATIONS[name],
        "layer_norm_eps": norm.eps,
    }


def text_tower(backbone: Backbone) -> Any:
    if not isinstance(backbone.text, TextTransformer):
        raise refusal(backbone, f"its text tower is a {type(backbone.text).__name__}, not one of CLIP's kind")
    return backbone.text


def has_clip_words(backbone: Backbone) -> bool:
    """Return whether the words are CLIP's, without building a tokenizer, because some are on the hub."""
    return "hf_tokenizer_name" not in backbone.config["text_cfg"]


def checked(backbone: Backbone, state: State, config: dict[str, Any]) -> State:
    """Return the state; raise ValueError unless the model of transformers has exactly these names and shapes."""
    import transformers

    kind = config["architectures"][0]
    model_class = getattr(transformers, kind)
    with torch.device("meta"):
        theirs = model_class(model_class.config_class(**config)).state_dict()
    # transformers 5 omits the prefix of a single tower.
    names, expected = (
        {key.removeprefix("text_model."): tuple(value.shape) for key, value in weights.items()}
        for weights in (state, theirs)
    )
    if wrong := sorted(names.items() ^ expected.items()):
        raise refusal(backbone, f"{kind} has other weights ({len(wrong)} differ, as {wrong[0][0]} {wrong[0][1]})")
    return state


def refusal(backbone: Backbone, why: str) -> ValueError:
    return ValueError(f"transformers cannot hold {backbone.name}: {why}. export.to=open_clip holds every model.")


def tokenizer_files(backbone: Backbone) -> Files:
    """Return the tokenizer, with open_clip's cleaning of a text."""
    tokenizer: Any = backbone.tokenizer
    if isinstance(tokenizer, SimpleTokenizer):
        return clip_files(backbone.context_length)
    clean = backbone.config["text_cfg"].get("tokenizer_kwargs", {}).get("clean", "whitespace")
    return hub_files(tokenizer.tokenizer, backbone.context_length, clean)


def image_files(backbone: Backbone) -> Files:
    """Return `preprocessor_config.json`, which LLaVA reads and transformers 5 no longer writes."""
    side, settings = backbone.image_size, backbone.preprocess
    square = {"height": side, "width": side}
    family = "Siglip" if isinstance(backbone.visual, TimmModel) else "CLIP"
    cut = settings["resize_mode"] != "squash" and family == "CLIP"
    if settings["resize_mode"] == "longest":
        raise refusal(backbone, "its pictures are fitted by their longer side, which no processor there does")
    described: dict[str, Any] = {
        "image_processor_type": f"{family}ImageProcessor",
        "processor_class": f"{family}Processor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": side} if cut else square,
        "resample": INTERPOLATION[settings["interpolation"]],
        "do_center_crop": cut,
        "crop_size": square,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(settings["mean"]),
        "image_std": list(settings["std"]),
    }
    return {"preprocessor_config.json": described}
