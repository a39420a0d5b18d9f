"""Folders load with transformers 4, which LLaVA and many pipelines bring, and 5.0, in environments of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kinds import TEXTS, exported, text_features
from safetensors.torch import save_file

OLDER = {
    "4.57.6": ("transformers==4.57.6", "tokenizers==0.22.2", "huggingface_hub==0.36.2"),
    "5.0.0": (
        "transformers==5.0.0",
        "tokenizers==0.22.2",
        "huggingface_hub==1.3.4",
        "sentencepiece",
    ),  # 5.0 needs the last for SigLIP
}
SCRIPT = """
import sys, torch, transformers
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer, CLIPModel, CLIPTextModel, CLIPTokenizer, CLIPVisionModel, SiglipModel
assert transformers.__version__ == sys.argv[2], transformers.__version__
folder, expected = sys.argv[1], load_file(sys.argv[1] + "/expected.safetensors")

def same(theirs, name):
    theirs = theirs if torch.is_tensor(theirs) else theirs.pooler_output
    torch.testing.assert_close(theirs, expected[name], atol=1e-5, rtol=0)

def load(model_class, *path, **more):
    model, told = model_class.from_pretrained("/".join((folder, *path)), output_loading_info=True, **more)
    assert not any(told.values()), told
    return model.eval()

def ids(tokenizer):
    return tokenizer(TEXTS, padding="max_length", truncation=True, return_tensors="pt").input_ids

TEXTS = %r
with torch.no_grad():
    for kind, model_class in (("clip", CLIPModel), ("siglip", SiglipModel)):
        model = load(model_class, kind, "transformers")
        tokens = ids(AutoTokenizer.from_pretrained(f"{folder}/{kind}/transformers"))
        same(model.get_image_features(expected["pixels"]), kind + ".image")
        same(model.get_text_features(tokens), kind + ".text")
        tower = load(AutoModel, kind, "llava")
        features = tower(expected["pixels"]).pooler_output
        same(features @ expected["clip.proj"] if kind == "clip" else features, kind + ".image")
    text = load(CLIPTextModel, "clip", "diffusers", subfolder="text_encoder")
    TEXTS = TEXTS[:2]
    tokens = ids(CLIPTokenizer.from_pretrained(folder + "/clip/diffusers", subfolder="tokenizer"))
    assert tokens.shape[1] == 248
    same(text(tokens).pooler_output @ expected["clip.text_proj"], "clip.plain_text")
    text.resize_token_embeddings(text.config.vocab_size + 1)
    tokens[:, 1] = text.config.vocab_size - 1  # an added token has the largest id; the end stays where it is
    end = (tokens == text.config.eos_token_id).int().argmax(dim=-1)
    found = text(tokens)
    assert torch.equal(found.pooler_output, found.last_hidden_state[torch.arange(len(tokens)), end])
"""


@pytest.fixture(scope="session", params=OLDER)
def older(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """An older transformers laid over this environment; installing it takes a package index and some seconds."""
    folder = tmp_path_factory.mktemp("older")
    where = ["--quiet", "--no-deps", "--python", sys.executable, "--target", str(folder)]
    installed = subprocess.run(
        [sys.executable, "-m", "uv", "pip", "install", *where, *OLDER[request.param]], check=False
    )
    if installed.returncode:
        pytest.skip(f"transformers {request.param} cannot be installed: no package index")
    return request.param, folder


@pytest.mark.slow
def test_older_transformers(older, backbones, tmp_path):
    version, folder = older
    pixels = torch.rand(2, 3, 32, 32)
    expected = {"pixels": pixels}
    for name, kind in (("clip", "248 tokens"), ("siglip", "siglip")):
        backbone = backbones[kind]
        for target in ("transformers", "llava", *(["diffusers"] if name == "clip" else [])):
            exported(backbone, target, tmp_path / name)
        expected[f"{name}.image"] = backbone.model.encode_image(pixels)
        expected[f"{name}.text"] = text_features(backbone)
    expected["clip.plain_text"] = text_features(backbones["248 tokens"], TEXTS[:2])
    expected["clip.proj"] = backbones["248 tokens"].visual.proj
    expected["clip.text_proj"] = backbones["248 tokens"].text.text_projection
    save_file({key: value.detach().clone() for key, value in expected.items()}, tmp_path / "expected.safetensors")
    command = [sys.executable, "-c", SCRIPT % (TEXTS,), str(tmp_path), version]
    told = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(folder)}, capture_output=True, text=True, check=False
    )
    assert told.returncode == 0, told.stderr
