"""Small models of each kind that can be exported. All their weights differ, so that confused weights are noticed."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from architectures import CLIP, architecture
from PIL import Image
from timm.models import register_model
from timm.models.vision_transformer import _create_vision_transformer
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import PreTrainedTokenizerFast

from clipfix.export import TARGETS
from clipfix.export.folder import write
from clipfix.functional.positions import stretch as stretched
from clipfix.models.clip import Backbone

TEXTS = ["A red circle", "", "It’s two dogs &amp; a “blue” square above them", "a word " * 300]
QUICK = CLIP | {"quick_gelu": True}
SIGLIP = {
    "embed_dim": 32,
    "init_logit_bias": -10,
    "custom_text": True,
    "vision_cfg": {"image_size": 32, "timm_model_name": "vit_mini_siglip", "timm_pool": "map", "timm_proj": "none"},
    "text_cfg": {
        "context_length": 16, "vocab_size": 40, "width": 32, "heads": 2, "layers": 2, "mlp_ratio": 3.7362,
        "hf_tokenizer_name": "of-the-hub", "tokenizer_kwargs": {"clean": "canonicalize"},
        "no_causal_mask": True, "proj_bias": True, "pool_type": "last", "norm_kwargs": {"eps": 1e-6},
    },
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "quick gelu": {"config": QUICK},
    "gelu": {"config": CLIP},
    "248 tokens": {"config": QUICK | {"text_cfg": CLIP["text_cfg"] | {"context_length": 77}}, "stretch": (20, 4)},
    "52 tokens": {"config": QUICK, "stretch": (4, 4)},
    "siglip": {"config": SIGLIP},
    "siglip, 40 tokens": {"config": SIGLIP, "stretch": (8, 4)},
}


@register_model
def vit_mini_siglip(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Return a small SigLIP of timm."""
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "mlp_ratio": 3.7362}
    kwargs = {**sizes, "class_token": False, "global_pool": "map", **kwargs}
    return _create_vision_transformer("vit_base_patch16_siglip_224", pretrained=pretrained, **kwargs)


def word_tokenizer(folder: Path) -> None:
    """Write a tokenizer of words that ends and pads texts with the same token, as SigLIP's does."""
    words = ["</s>", "<unk>", "a", "red", "circle", "two", "dogs", "blue", "square", "above", "them", "word", "its"]
    tokenizer = Tokenizer(WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 0)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="</s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


def build(folder: Path, config: dict[str, Any], stretch: tuple[int, int] | None = None) -> Backbone:
    """Return a backbone with random weights, and a stretched positional table if `stretch` is given."""
    architecture(folder, config, mean=[0.1, 0.2, 0.3], std=[0.5, 0.6, 0.7])
    if "hf_tokenizer_name" in config["text_cfg"]:
        word_tokenizer(folder)
    backbone = Backbone(str(folder), "random").eval().requires_grad_(False)
    torch.manual_seed(0)
    for weight in backbone.parameters():
        nn.init.normal_(weight, std=0.2)
    if stretch:  # of any model, also of one whose features this changes
        backbone.set_positions(stretched(backbone.text.get_parameter("positional_embedding").detach(), *stretch))
    return backbone


@pytest.fixture(scope="session")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Backbone]:
    return {kind: build(tmp_path_factory.mktemp("model"), **made) for kind, made in KINDS.items()}


@pytest.fixture(params=KINDS)
def backbone(request: pytest.FixtureRequest, backbones: dict[str, Backbone]) -> Backbone:
    return backbones[request.param]


@pytest.fixture(scope="session")
def picture() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3))
    return Image.fromarray(pixels.astype(np.uint8))


def image_features(backbone: Backbone, picture: Image.Image) -> torch.Tensor:
    """Return the features of a picture."""
    return backbone.encode_image(torch.tensor(np.array(picture)).permute(2, 0, 1)[None] / 255)


def text_features(backbone: Backbone, texts: list[str] = TEXTS) -> torch.Tensor:
    return backbone.encode_text(backbone.tokenize(texts))


def equal(theirs: torch.Tensor, ours: torch.Tensor) -> None:
    """Assert that features are equal, and not constant."""
    assert ours.std() > 0.01, "constant features are always equal"
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=0)


def content(path: Path) -> Any:
    return json.loads(path.read_text())


def exported(backbone, target: str, folder: Path) -> Path:
    """Export a backbone and return its folder."""
    write(TARGETS[target](backbone), folder / target, torch.float32)
    return folder / target


def loaded(model_class, folder: Path, subfolder: str = "", extra: tuple[str, ...] = ()):
    """Return a model loaded by transformers. Missing weights, for which it only warns, are an error here."""
    model, info = model_class.from_pretrained(folder, subfolder=subfolder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    assert not [key for key in info["unexpected_keys"] if not key.startswith(extra)]
    return model.eval()
