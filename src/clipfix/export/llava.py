"""A vision tower for LLaVA and similar models: files for `CLIPVisionModel` or `SiglipVisionModel`."""

from clipfix.export import transformers
from clipfix.export.folder import Files, Weights
from clipfix.models.clip import Backbone


def files(backbone: Backbone) -> Files:
    """Return the visual tower with names `vision_model.*`, which transformers 4, the version of LLaVA, needs."""
    state, config = transformers.model(backbone)
    tower = {key: value for key, value in state.items() if key.startswith("vision_model.")}
    name = config["architectures"][0].replace("Model", "VisionModel")
    described = {"architectures": [name], **config["vision_config"]}
    weights: Files = {"config.json": described, "model.safetensors": Weights(tower, in_parts=True)}
    return weights | transformers.image_files(backbone)
