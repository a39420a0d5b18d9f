"""A text encoder for ComfyUI: one file for models/text_encoders.

ComfyUI distinguishes its three CLIPs by the number of blocks, and takes the length from the position table.
Source: comfy/sd1_clip_config.json, sd2_clip_config.json and clip_config_bigg.json; `CLIPTextModel` of
comfy/clip_model.py, whose projection is square; `detect_te_model` of comfy/sd.py.
Departs: ComfyUI is not a library and was not run. Its code shows that it takes files with these names and shapes.
"""

from clipfix.export import transformers
from clipfix.export.diffusers import text_model
from clipfix.export.folder import Files, Weights
from clipfix.models.clip import Backbone

KEYS = ("hidden_size", "projection_dim", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act")
KNOWN = {
    "clip_l": (768, 768, 12, 12, 3072, "quick_gelu"),  # OpenAI's L/14: Stable Diffusion 1, SDXL, SD 3, Flux
    "clip_h": (1024, 1024, 24, 16, 4096, "gelu"),  # Stable Diffusion 2
    "clip_g": (1280, 1280, 32, 20, 5120, "gelu"),  # SDXL, SD 3
}


def files(backbone: Backbone) -> Files:
    """Return the text tower with its projection, in a file named by kind and length."""
    config = transformers.clip_text(backbone)
    sizes = tuple(config[key] for key in KEYS)
    kind = next((name for name, known in KNOWN.items() if known == sizes), None)
    if kind is None:
        raise ValueError(
            f"ComfyUI cannot hold {backbone.name}: a text tower of {dict(zip(KEYS, sizes, strict=True))} is none of "
            f"those it builds, {', '.join(KNOWN)}: {list(KNOWN.values())}. export.to=open_clip holds every model."
        )
    state, _ = text_model(backbone, projected=True)
    return {f"{kind}_{config['max_position_embeddings']}_tokens.safetensors": Weights(state)}
