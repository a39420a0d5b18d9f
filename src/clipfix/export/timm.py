"""The visual tower for timm: `timm.create_model("local-dir:/path/to/folder", pretrained=True)`.

timm reads weights with open_clip's names and renames them; the classifier is CLIP's projection.
"""

from typing import Any

from open_clip.timm_model import TimmModel

from clipfix.export import transformers
from clipfix.export.folder import Files, Weights
from clipfix.models.clip import Backbone
from clipfix.models.pretrained import WEIGHT_FILES

# One architecture of timm represents all of CLIP's; `model_args` set the sizes.
CLIP = {"gelu": "vit_base_patch16_clip_224", "quick_gelu": "vit_base_patch16_clip_quickgelu_224"}
NORM_EPS = 1e-5  # of these two


def files(backbone: Backbone) -> Files:
    """Return timm's config.json and the visual tower; its output are features in the joint space."""
    visual: Any = backbone.visual
    if isinstance(visual, TimmModel):
        if len(visual.head):
            name = backbone.config["vision_cfg"]["timm_model_name"]
            raise refusal(backbone, f"open_clip puts layers of its own behind {name}")
        architecture, classes = backbone.config["vision_cfg"]["timm_model_name"], visual.trunk.num_classes
        arguments = {"global_pool": visual.trunk.global_pool}
    else:
        sizes = transformers.clip_visual(backbone)
        if sizes["layer_norm_eps"] != NORM_EPS:
            raise refusal(backbone, f"its norms add {sizes['layer_norm_eps']}, timm's CLIP {NORM_EPS}")
        architecture, classes = CLIP[sizes["hidden_act"]], backbone.embed_dim
        arguments = {
            "img_size": sizes["image_size"],
            "patch_size": sizes["patch_size"],
            "embed_dim": sizes["hidden_size"],
            "depth": sizes["num_hidden_layers"],
            "num_heads": sizes["num_attention_heads"],
            "mlp_ratio": backbone.config["vision_cfg"].get("mlp_ratio", 4.0),
        }
    side, settings = backbone.image_size, backbone.preprocess
    described = {
        "architecture": architecture,
        "num_classes": classes,
        "num_features": visual.trunk.num_features if isinstance(visual, TimmModel) else sizes["hidden_size"],
        "pretrained_cfg": {
            "input_size": [3, side, side],
            "interpolation": settings["interpolation"] if settings["interpolation"] != "random" else "bicubic",
            "crop_pct": 1.0,
            "crop_mode": "squash" if settings["resize_mode"] == "squash" else "center",
            "mean": list(settings["mean"]),
            "std": list(settings["std"]),
            "num_classes": classes,
        },
        "model_args": arguments,
    }
    tower = {key: value for key, value in backbone.as_open_clip()[0].items() if key.startswith("visual.")}
    return {"config.json": described, WEIGHT_FILES[0]: Weights(tower)}


def refusal(backbone: Backbone, why: str) -> ValueError:
    return ValueError(f"timm cannot hold {backbone.name}: {why}. export.to=open_clip holds every model.")
