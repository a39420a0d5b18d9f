"""Files in the layouts of others, written small, then read by the real loader and compared with the original model."""

import json
import pickle
from pathlib import Path

import open_clip
import pytest
import torch
from architectures import CLIP, architecture, same, transformers_clip, untrained
from open_clip.transformer import TextTransformer
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.nn.functional import normalize
from transformers import CLIPImageProcessor, SiglipConfig, SiglipModel

from clipfix.models import convert
from clipfix.models.clip import Backbone
from clipfix.models.pretrained import matching_architectures
from clipfix.training.checkpoints import load_repair

QUICK = CLIP | {"quick_gelu": True}
TEXTS = ["a red circle", "two dogs, and a blue square above them"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return architecture(tmp_path / "quick", QUICK, mean=[0.1, 0.2, 0.3], std=[0.5, 0.6, 0.7])


@pytest.fixture
def plain(folder: Path) -> nn.Module:
    return untrained(folder)


def diva(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What DIVA's training saves: the whole model, of which the CLIP is one part."""
    others = ("vae.encoder.conv_in.weight", "unet.conv_in.weight", "text_encoder.text_model.final_layer_norm.weight")
    others += ("visual_proj.weight", "visual_proj.bias", "class_model.final_fc.weight")
    return {name: torch.rand(2) for name in others} | {f"class_model.model.{key}": v for key, v in state.items()}


@pytest.mark.parametrize("layout", [diva, dict], ids=["of DIVA's training", "released"])
def test_diva(layout, folder, plain, tmp_path):
    torch.save(layout(plain.state_dict()), file := tmp_path / "diva.pth")
    assert same(Backbone(str(folder), pretrained=str(file)), plain)


def test_long_clip(folder, tmp_path):
    """The oracle adds the tables under masks, as the authors' `encode_text` does."""
    long = architecture(tmp_path / "long", QUICK | {"text_cfg": QUICK["text_cfg"] | {"context_length": 248}})
    torch.manual_seed(1)
    plain = open_clip.create_model(f"local-dir:{long}", load_weights=False).eval()
    first, second = torch.randn(2, 248, 32)
    torch.save(plain.state_dict() | {"positional_embedding": first, "positional_embedding_res": second}, tmp_path / "l")
    mask = torch.zeros(248, 1)
    mask[:20] = 1
    plain.positional_embedding.data = first * mask + second * (1 - mask)

    backbone = Backbone(str(folder), pretrained=str(tmp_path / "l")).eval()  # its architecture says 16 tokens
    assert backbone.context_length == 248
    texts = [*TEXTS, "a word " * 90]
    theirs = plain.encode_text(open_clip.tokenize(texts, context_length=248))
    torch.testing.assert_close(backbone.encode_text(backbone.tokenize(texts)), theirs, atol=1e-6, rtol=1e-5)
    assert Backbone(str(backbone.save(tmp_path / "saved"))).context_length == 248
    with pytest.raises(ValueError, match=r"248 rows, .* expects 77: set backbone.context_length=248"):
        Backbone(str(folder), pretrained=str(tmp_path / "l"), context_length=77)
    other = architecture(tmp_path / "other", CLIP)
    with pytest.raises(ValueError, match=r"QuickGELU.* backbone\.name="):
        Backbone(str(other), pretrained=str(tmp_path / "l"))


@pytest.mark.parametrize(("length", "act"), [(16, "gelu"), (248, "quick_gelu")])
def test_transformers_clip_folder(length, act, vocabulary, tmp_path):
    theirs = transformers_clip(tmp_path, vocabulary, length, act)
    backbone = Backbone(str(tmp_path)).eval()
    assert (backbone.context_length, backbone.image_size, backbone.embed_dim) == (length, 32, 24)
    images, tokens = torch.rand(2, 3, 32, 32), backbone.tokenize([*TEXTS, "a word " * 90])
    pixels = (images - torch.tensor([0.1, 0.2, 0.3])[:, None, None]) / torch.tensor([0.5, 0.6, 0.7])[:, None, None]
    found = theirs(input_ids=tokens, pixel_values=pixels)
    for mine, other in (
        (backbone.encode_image(images), found.image_embeds),
        (backbone.encode_text(tokens), found.text_embeds),
    ):
        torch.testing.assert_close(normalize(mine, dim=-1), other, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(backbone.logit_scale, theirs.logit_scale)
    # What it saves is a folder that open_clip loads by itself.
    again = open_clip.create_model(f"local-dir:{backbone.save(tmp_path / 'saved', torch.float32)}").eval()
    torch.testing.assert_close(again.encode_image(pixels), backbone.encode_image(images), atol=1e-6, rtol=1e-5)


def test_transformers_folders_say_what_they_lack(vocabulary, tmp_path):
    transformers_clip(tmp_path, vocabulary)
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary | {"fish</w>": 0}))
    with pytest.raises(ValueError, match=r"backbone\.name=.* vocabulary"):
        Backbone(str(tmp_path)).tokenize(["a fish"])
    (tmp_path / "vocab.json").unlink()
    with pytest.raises(ValueError, match=r"backbone\.name=.* tokenizer\.json"):
        Backbone(str(tmp_path)).tokenize(["a fish"])
    images = tmp_path / "preprocessor_config.json"
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": json.loads(images.read_text())}))
    images.unlink()
    assert Backbone(str(tmp_path)).preprocess["mean"] == (0.1, 0.2, 0.3)
    (tmp_path / "processor_config.json").unlink()
    with pytest.raises(ValueError, match=r"preprocessor_config\.json"):
        Backbone(str(tmp_path))


def test_transformers_siglip():
    """The towers of open_clip's SigLIP, at a small size: timm's for pictures, open_clip's own for texts."""
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32, "intermediate_size": 128}
    text = sizes | {"vocab_size": 40, "max_position_embeddings": 16, "hidden_act": "gelu"}
    vision = sizes | {"image_size": 32, "patch_size": 8, "hidden_act": "gelu"}
    torch.manual_seed(3)
    theirs = SiglipModel(SiglipConfig(text_config=text, vision_config=vision)).eval()
    for weight in theirs.parameters():
        nn.init.normal_(weight, std=0.3)
    state = convert.to_open_clip(theirs.state_dict())
    pictures = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=0, class_token=False,
        global_pool="map",
    ).eval()  # fmt: skip
    texts = TextTransformer(
        context_length=16, vocab_size=40, width=32, heads=2, layers=2, output_dim=32, no_causal_mask=True,
        pool_type="last", proj_bias=True, norm_layer=lambda width: nn.LayerNorm(width, eps=1e-6),
    ).eval()  # fmt: skip
    for module, prefix in ((pictures, "visual.trunk."), (texts, "text.")):
        module.load_state_dict({key[len(prefix) :]: v for key, v in state.items() if key.startswith(prefix)})
    images, tokens = torch.rand(2, 3, 32, 32), torch.randint(40, (2, 16))
    found = theirs(input_ids=tokens, pixel_values=images)
    torch.testing.assert_close(normalize(pictures(images), dim=-1), found.image_embeds, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(normalize(texts(tokens), dim=-1), found.text_embeds, atol=1e-6, rtol=1e-5)
    assert {"logit_scale", "logit_bias"} <= state.keys()


@pytest.mark.parametrize(
    ("name", "patch", "size", "length", "vocabulary"),
    [("ViT-B-16-SigLIP", 16, 224, 64, 32000), ("ViT-B-16-SigLIP2-384", 16, 384, 64, 256000)],
)
def test_a_siglip_folder_is_open_clips_architecture(name, patch, size, length, vocabulary, tmp_path):
    sizes = {"num_hidden_layers": 12, "num_attention_heads": 12, "hidden_size": 768, "intermediate_size": 3072}
    text = sizes | {"vocab_size": vocabulary, "max_position_embeddings": length}
    SiglipConfig(text_config=text, vision_config=sizes | {"image_size": size, "patch_size": patch}).save_pretrained(
        tmp_path
    )
    CLIPImageProcessor(image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(tmp_path)
    with torch.device("meta"):
        backbone = Backbone(str(tmp_path), "random")
    assert backbone.config == open_clip.get_model_config(name)


def test_a_file_in_parts(folder, plain, tmp_path):
    state = list(plain.state_dict().items())
    for number, part in ((1, state[:5]), (2, state[5:])):
        save_file(dict(part), tmp_path / f"model-0000{number}-of-00002.safetensors")
    assert same(Backbone(str(folder), pretrained=str(tmp_path / "model-00001-of-00002.safetensors")), plain)


def refused(folder: Path, file: Path, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        Backbone(str(folder), pretrained=str(file))
    assert str(file) in str(error.value)


def test_what_cannot_be_read_is_refused_with_the_way_out(folder, plain, tmp_path):
    file = tmp_path / "weights.pt"
    torch.save(plain, file)
    refused(folder, file, r"Python objects.*torch\.save\(torch\.load\(path, weights_only=False\)\.state_dict\(\)")
    file.write_bytes(pickle.dumps({"visual.proj": Path("x")}))
    refused(folder, file, "Python objects")
    torch.save(plain.state_dict(), file)
    file.write_bytes(file.read_bytes()[:5000])
    refused(folder, file, "is damaged")
    torch.save({"encoder.weight": torch.rand(2), "head": torch.rand(2)}, file)
    refused(folder, file, "no CLIP in a known layout .* names begin with encoder, head")
    torch.save({"state_dict": {"backbone.model.visual.proj": torch.rand(2)}}, file)
    refused(folder, file, "checkpoint of clipfix.* checkpoint=")
    with pytest.raises(ValueError, match=r"set backbone\.name=.*backbone\.pretrained=null"):
        Backbone("ViT-B-32", pretrained=str(folder))
    with pytest.raises(ValueError, match=r"openai.* backbone\.pretrained=null"):
        Backbone(str(folder), pretrained="openai")


def test_a_whole_model_is_no_checkpoint(folder, plain, tmp_path):
    backbone = Backbone(str(folder), "random")
    torch.save(plain.state_dict(), whole := tmp_path / "whole.pt")
    torch.save(plain, module := tmp_path / "module.pt")
    for file in (whole, module):
        with pytest.raises(ValueError, match=r"checkpoint=.*backbone\.pretrained="):
            load_repair(backbone, str(file))
    with pytest.raises(ValueError, match="checkpoint="):
        load_repair(backbone, str(tmp_path / "nowhere.ckpt"))


def test_another_architecture_is_named(folder, plain, tmp_path):
    torch.save(plain.state_dict(), file := tmp_path / "weights.pt")
    wide = architecture(tmp_path / "wide", QUICK | {"vision_cfg": CLIP["vision_cfg"] | {"width": 96}})
    with pytest.raises(ValueError, match=r"has another architecture: visual\..*backbone\.name="):
        Backbone(str(wide), pretrained=str(file))
    with torch.device("meta"):
        state = Backbone("ViT-B-16").model.state_dict()
    found = matching_architectures(state)
    assert {"ViT-B-16", "ViT-B-16-quickgelu"} <= set(found)
    assert not {"ViT-B-32", "ViT-L-14", "RN50"} & set(found)
    assert matching_architectures(state, quick_gelu=True) == ["ViT-B-16-quickgelu"]
