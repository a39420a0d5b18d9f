"""Folders of small CLIPs and SigLIPs for open_clip and transformers, without weights or with random ones."""

import json
from pathlib import Path

import open_clip
import torch
import yaml
from torch import nn
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

from clipfix.models.clip import Backbone

CONF = sorted((Path(__file__).parents[2] / "conf" / "backbone").glob("*.yaml"))
PUBLISHED = {path.stem: yaml.safe_load(path.read_text()) for path in CONF if path.stem not in ("tiny", "folder")}
TEXT = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
CLIP = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 64, "head_width": 32, "layers": 2},
    "text_cfg": TEXT,
}
VIT_SIGLIP = {"image_size": 224, "timm_model_name": "vit_tiny_patch16_224", "timm_pool": "map", "timm_proj": "none"}
SIGLIP = {"embed_dim": 192, "init_logit_bias": -10, "custom_text": True, "vision_cfg": VIT_SIGLIP, "text_cfg": TEXT}
VARIANTS = {
    "clip": CLIP,
    "norm after pooling": CLIP | {"vision_cfg": CLIP["vision_cfg"] | {"final_ln_after_pool": True, "pool_type": "avg"}},
    "average pooling": CLIP | {"vision_cfg": CLIP["vision_cfg"] | {"pool_type": "avg"}},
    "siglip": SIGLIP,
    "timm with a linear head": SIGLIP
    | {"embed_dim": 24, "vision_cfg": VIT_SIGLIP | {"timm_pool": "", "timm_proj": "linear"}},
}


def architecture(folder: Path, config: dict, **preprocess: object) -> Path:
    """Write an open_clip folder without weights, and return it."""
    folder.mkdir(exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    return folder


def untrained(folder: Path) -> nn.Module:
    """Return open_clip's own model of a folder, with which the backbone is compared."""
    torch.manual_seed(1)
    return open_clip.create_model(f"local-dir:{folder}", load_weights=False).eval()


def same(backbone: Backbone, plain: nn.Module) -> bool:
    """Return whether a backbone and a model of open_clip give the same features."""
    images, texts = torch.rand(2, 3, 32, 32), ["a red circle", "two dogs"]
    pixels = (images - backbone.mean) / backbone.std
    backbone.eval()
    return torch.allclose(backbone.encode_image(images), plain.encode_image(pixels), atol=1e-6) and torch.allclose(
        backbone.encode_text(backbone.tokenize(texts)),
        plain.encode_text(open_clip.tokenize(texts, context_length=16)),
        atol=1e-6,
    )


def transformers_clip(folder: Path, vocabulary: dict[str, int], length: int = 16, act: str = "gelu") -> CLIPModel:
    """Write a small CLIP of transformers with random weights, and return it."""
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_act": act}
    text = {"hidden_size": 32, "intermediate_size": 128, "max_position_embeddings": length, "eos_token_id": 2}
    vision = {"hidden_size": 64, "intermediate_size": 240, "image_size": 32, "patch_size": 8}
    torch.manual_seed(2)
    model = CLIPModel(CLIPConfig(text_config=text | sizes, vision_config=vision | sizes, projection_dim=24)).eval()
    for name, weight in model.named_parameters():
        if name.endswith("bias") or "norm" in name:  # with zeros and ones, confused weights would not be noticed
            nn.init.normal_(weight, mean=0.5)
    model.save_pretrained(folder)
    CLIPImageProcessor(image_mean=[0.1, 0.2, 0.3], image_std=[0.5, 0.6, 0.7]).save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    return model
