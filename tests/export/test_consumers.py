"""Each consumer loads its folder by its own loader, from pictures and texts to features that equal ours."""

import logging

import open_clip
import pytest
import timm
import torch
from architectures import PUBLISHED
from kinds import CLIP, QUICK, SIGLIP, TEXTS, build, content, equal, exported, image_features, loaded, text_features
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoProcessor,
    CLIPModel,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    SiglipModel,
    SiglipTextModel,
    SiglipVisionModel,
)

from clipfix.export import TARGETS, diffusers
from clipfix.export.folder import write_weights
from clipfix.models.clip import Backbone


def pooled(output) -> torch.Tensor:
    return output if torch.is_tensor(output) else output.pooler_output


def test_open_clip(backbone, picture, tmp_path):
    folder = exported(backbone, "open_clip", tmp_path)
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    model.eval()
    equal(model.encode_image(preprocess(picture)[None]), image_features(backbone, picture))
    equal(model.encode_text(tokenizer(TEXTS)), text_features(backbone))
    assert model.logit_scale == backbone.logit_scale
    again = Backbone(str(folder)).eval()
    equal(text_features(again), text_features(backbone))


def test_transformers(backbone, picture, tmp_path):
    folder = exported(backbone, "transformers", tmp_path)
    siglip = "timm_model_name" in backbone.config["vision_cfg"]
    model = loaded(SiglipModel if siglip else CLIPModel, folder)
    processor = AutoProcessor.from_pretrained(folder)
    inputs = processor(text=TEXTS, images=[picture], padding="max_length", truncation=True, return_tensors="pt")
    assert inputs.input_ids.shape == (len(TEXTS), backbone.context_length)
    equal(pooled(model.get_image_features(inputs.pixel_values)), image_features(backbone, picture))
    equal(pooled(model.get_text_features(inputs.input_ids)), text_features(backbone))
    assert model.logit_scale.item() == backbone.logit_scale.item()
    assert type(AutoModel.from_pretrained(folder)) is type(model)


@pytest.mark.parametrize("kind", ["quick gelu", "248 tokens"])
def test_each_tower_of_the_transformers_folder(kind, backbones, picture, tmp_path):
    backbone = backbones[kind]
    folder = exported(backbone, "transformers", tmp_path)
    pixels = AutoImageProcessor.from_pretrained(folder)(picture, return_tensors="pt").pixel_values
    tokens = backbone.tokenize(TEXTS)
    whole = ("logit_scale", "visual_projection", "text_projection")
    visual = loaded(CLIPVisionModel, folder, extra=("text_model.", *whole))
    equal(visual(pixels).pooler_output @ backbone.visual.proj, image_features(backbone, picture))
    text = loaded(CLIPTextModel, folder, extra=("vision_model.", *whole))
    equal(text(tokens).pooler_output @ backbone.text.text_projection, text_features(backbone))
    visual = loaded(CLIPVisionModelWithProjection, folder, extra=("text_model.", *whole))
    equal(visual(pixels).image_embeds, image_features(backbone, picture))
    text = loaded(CLIPTextModelWithProjection, folder, extra=("vision_model.", *whole))
    equal(text(tokens).text_embeds, text_features(backbone))


def test_each_tower_of_the_transformers_folder_of_siglip(backbones, picture, tmp_path):
    backbone = backbones["siglip"]
    folder = exported(backbone, "transformers", tmp_path)
    pixels = AutoImageProcessor.from_pretrained(folder)(picture, return_tensors="pt").pixel_values
    visual = loaded(SiglipVisionModel, folder, extra=("text_model.", "logit_"))
    equal(visual(pixels).pooler_output, image_features(backbone, picture))
    text = loaded(SiglipTextModel, folder, extra=("vision_model.", "logit_"))
    equal(text(backbone.tokenize(TEXTS)).pooler_output, text_features(backbone))


def test_a_transformers_folder_in_parts(backbones, tmp_path):
    folder = exported(backbones["gelu"], "transformers", tmp_path)
    files = TARGETS["transformers"](backbones["gelu"])
    (folder / "model.safetensors").unlink()
    write_weights(folder / "model.safetensors", files["model.safetensors"], torch.float32, largest=1_000_000)
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    equal(pooled(loaded(CLIPModel, folder).get_text_features(backbones["gelu"].tokenize(TEXTS))),
          text_features(backbones["gelu"]))  # fmt: skip
    equal(text_features(Backbone(str(folder)).eval()), text_features(backbones["gelu"]))


@pytest.mark.parametrize("kind", ["quick gelu", "siglip"])
def test_llava(kind, backbones, picture, tmp_path):
    """The visual tower alone, with prefixed names: transformers 4 would leave others random with a mere warning."""
    backbone = backbones[kind]
    folder = exported(backbone, "llava", tmp_path)
    assert all(key.startswith("vision_model.") for key in load_file(folder / "model.safetensors"))
    assert (folder / "preprocessor_config.json").is_file()
    tower = loaded(SiglipVisionModel if kind == "siglip" else CLIPVisionModel, folder)
    pixels = AutoImageProcessor.from_pretrained(folder)(picture, return_tensors="pt").pixel_values
    features = tower(pixels).pooler_output
    equal(features if kind == "siglip" else features @ backbone.visual.proj, image_features(backbone, picture))


def test_timm(backbone, picture, tmp_path, caplog):
    folder = exported(backbone, "timm", tmp_path)
    with caplog.at_level(logging.WARNING):
        model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert not caplog.records
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
    equal(model(transform(picture)[None]), image_features(backbone, picture))


@pytest.mark.parametrize("kind", ["quick gelu", "248 tokens"])
def test_sentence_transformers(kind, backbones, picture, tmp_path):
    folder = exported(backbones[kind], "sentence_transformers", tmp_path)
    model = SentenceTransformer(str(folder), device="cpu")
    assert model.max_seq_length == backbones[kind].context_length
    equal(model.encode([picture], convert_to_tensor=True), image_features(backbones[kind], picture))
    equal(model.encode(TEXTS, convert_to_tensor=True), text_features(backbones[kind]))


def test_comfyui_takes_the_text_towers_it_builds(tmp_path):
    """OpenAI's text tower in full size, without weights: what counts are names, shapes and the length."""
    sizes = {"context_length": 248, "vocab_size": 49408, "width": 768, "heads": 12, "layers": 12}
    with torch.device("meta"):
        backbone = build(tmp_path / "clip_l", QUICK | {"embed_dim": 768, "text_cfg": sizes})
        expected = CLIPTextModelWithProjection(CLIPTextModelWithProjection.config_class(
            max_position_embeddings=248, hidden_size=768, num_attention_heads=12, intermediate_size=3072,
            projection_dim=768,
        )).state_dict()  # fmt: skip
    [(name, weights)] = TARGETS["comfyui"](backbone).items()
    assert name == "clip_l_248_tokens.safetensors"
    prefix = "text_model."
    names = {key if key == "text_projection.weight" else prefix + key.removeprefix(prefix) for key in expected}
    assert weights.state.keys() == names
    assert weights.state[f"{prefix}embeddings.position_embedding.weight"].shape == (248, 768)


@pytest.mark.parametrize(
    ("target", "config", "why"),
    [
        ("transformers", CLIP | {"vision_cfg": CLIP["vision_cfg"] | {"pool_type": "avg"}}, "pools all patches"),
        ("transformers", CLIP | {"vision_cfg": CLIP["vision_cfg"] | {"no_ln_pre": True}}, "no norm before the blocks"),
        ("llava", CLIP | {"vision_cfg": CLIP["vision_cfg"] | {"ls_init_value": 0.1}}, "has other weights"),
        ("transformers", CLIP | {"vision_cfg": SIGLIP["vision_cfg"] | {"timm_proj": "linear"}}, "is not SigLIP's"),
        ("timm", CLIP | {"vision_cfg": SIGLIP["vision_cfg"] | {"timm_proj": "linear"}}, "layers of its own behind"),
        ("diffusers", SIGLIP, "is not causal"),
        ("diffusers_2", CLIP | {"text_cfg": CLIP["text_cfg"] | {"no_causal_mask": True}}, "is not causal"),
        ("sentence_transformers", SIGLIP, "pads texts to the longest"),
        ("comfyui", CLIP, "none of those it builds, clip_l"),
    ],
)
def test_a_target_that_cannot_hold_a_model_says_why(target, config, why, tmp_path):
    backbone = build(tmp_path / "model", config)
    with pytest.raises(ValueError, match=r"cannot hold .*" + why):
        TARGETS[target](backbone)
    TARGETS["open_clip"](backbone)  # holds it


def test_the_stretched_length_is_told_everywhere(backbones, tmp_path):
    """open_clip would silently squeeze the table into the length that its config says."""
    backbone = backbones["248 tokens"]
    folder = exported(backbone, "open_clip", tmp_path)
    assert content(folder / "open_clip_config.json")["model_cfg"]["text_cfg"]["context_length"] == 248
    weights = load_file(folder / "open_clip_model.safetensors")
    assert [key for key in weights if "positional_embedding" in key] == [
        "positional_embedding",
        "visual.positional_embedding",
    ]
    assert weights["positional_embedding"].shape[0] == 248
    folder = exported(backbone, "transformers", tmp_path)
    text = content(folder / "config.json")["text_config"]
    assert (text["max_position_embeddings"], text["eos_token_id"]) == (248, 49407)
    assert content(folder / "tokenizer_config.json")["model_max_length"] == 248
    config = diffusers.files(backbone)["text_encoder/config.json"]
    assert config["max_position_embeddings"] == 248


@pytest.mark.parametrize("name", sorted({settings["name"] for settings in PUBLISHED.values()}))
def test_every_published_backbone_has_a_place(name):
    """In full size, without weights: transformers' own model has the same names and shapes."""
    with torch.device("meta"):
        backbone = Backbone(name, "random")
        files = TARGETS["llava"](backbone)
        TARGETS["timm"](backbone)
    exact = "SigLIP" in name  # SigLIP is published with approximate GELU, and open_clip computes the exact one
    assert files["config.json"]["hidden_act"] == ("gelu" if exact else "quick_gelu")
