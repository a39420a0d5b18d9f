"""A text encoder for the pipelines of diffusers: `text_encoder/` and `tokenizer/`, which replace those of a model.

Pipelines cut a prompt at `tokenizer.model_max_length`, which is the length of the text tower. SDXL concatenates the
features of its two encoders per token, so both must have the same length: stretch both.
"""

from clipfix.export import transformers
from clipfix.export.folder import Files, Weights
from clipfix.export.tokenizer import clip_files
from clipfix.models.clip import Backbone


def files(backbone: Backbone) -> Files:
    """Return the encoder of SD 1.5 and Flux, and the first of SDXL: `CLIPTextModel`, padded by the end token."""
    return encoder(backbone, "", "<|endoftext|>", projected=False)


def second_files(backbone: Backbone) -> Files:
    """Return SDXL's second encoder, an OpenCLIP bigG: `CLIPTextModelWithProjection`, padded by `!` with the id 0."""
    return encoder(backbone, "_2", "!", projected=True)


def encoder(backbone: Backbone, number: str, pad_token: str, projected: bool) -> Files:
    state, config = text_model(backbone, projected)
    tokenizer = clip_files(backbone.context_length, pad_token, cleaned=False)
    content: Files = {
        f"text_encoder{number}/config.json": config,
        f"text_encoder{number}/model.safetensors": Weights(state, in_parts=True),
    }
    return content | {f"tokenizer{number}/{name}": file for name, file in tokenizer.items()}


def text_model(backbone: Backbone, projected: bool) -> tuple[dict, dict]:
    """Return weights and config of the text tower; raise ValueError if it is not of CLIP's kind."""
    config = transformers.clip_text(backbone)
    kept = ("text_model.", "text_projection.") if projected else ("text_model.",)
    text = {key: value for key, value in backbone.model.state_dict().items() if key.startswith("text.")}
    state = {key: value for key, value in transformers.to_clip(text).items() if key.startswith(kept)}
    name = "CLIPTextModelWithProjection" if projected else "CLIPTextModel"
    return transformers.checked(backbone, state, config := {"architectures": [name], **config}), config
