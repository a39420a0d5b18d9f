"""The real loaders on real file formats: every artefact is written to disk first, then loaded by name."""

from pathlib import Path

import open_clip
import pytest
import torch
from architectures import CLIP, PUBLISHED, TEXT, VARIANTS, architecture, same, untrained
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import PreTrainedTokenizerFast

from clipfix.models.clip import Backbone
from clipfix.models.pretrained import WEIGHT_FILES


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return architecture(tmp_path / "clip", CLIP, mean=[0.1, 0.2, 0.3], std=[0.5, 0.6, 0.7])


@pytest.fixture
def plain(folder: Path) -> nn.Module:
    return untrained(folder)


def test_open_clip_folder_loads_as_open_clip_loads_it(folder: Path, plain: nn.Module) -> None:
    save_file(plain.state_dict(), folder / "open_clip_model.safetensors")
    backbone = Backbone(str(folder))
    assert same(backbone, plain)
    assert (backbone.image_size, backbone.embed_dim, backbone.context_length) == (32, 24, 16)
    assert backbone.mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert not same(Backbone(str(folder), pretrained="random"), plain)


@pytest.mark.parametrize("wrap", ["plain", "training checkpoint", "distributed checkpoint", "safetensors"])
def test_checkpoint_files(folder: Path, plain: nn.Module, tmp_path: Path, wrap: str) -> None:
    state, file = plain.state_dict(), tmp_path / "weights.pt"
    if wrap == "safetensors":
        save_file(state, file := tmp_path / "weights.safetensors")
    elif wrap == "plain":
        torch.save(state, file)
    else:
        prefix = "module." if wrap == "distributed checkpoint" else ""
        torch.save({"epoch": 1, "state_dict": {prefix + key: value for key, value in state.items()}}, file)
    assert same(Backbone(str(folder), pretrained=str(file)), plain)


class OpenAIArchive(nn.Module):
    """Laid out as OpenAI's archives are: CLIP's own keys, and three integers beside them."""

    def __init__(self, clip: nn.Module) -> None:
        super().__init__()
        self.visual, self.transformer, self.ln_final = clip.visual, clip.transformer, clip.ln_final
        self.token_embedding, self.positional_embedding = clip.token_embedding, clip.positional_embedding
        self.text_projection, self.logit_scale = clip.text_projection, clip.logit_scale
        for name, value in {"input_resolution": 32, "context_length": 16, "vocab_size": 49408}.items():
            self.register_buffer(name, torch.tensor(value))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.visual(image)


@pytest.mark.parametrize("archive", ["TorchScript", "state dict"])
def test_openai_files_want_quick_gelu(tmp_path: Path, archive: str) -> None:
    quick = architecture(tmp_path / "quick", CLIP | {"quick_gelu": True})
    torch.manual_seed(1)
    plain = open_clip.create_model(f"local-dir:{quick}", load_weights=False).eval()
    module, file = OpenAIArchive(plain), tmp_path / "openai.pt"
    if archive == "TorchScript":
        torch.jit.trace(module, torch.rand(1, 3, 32, 32), check_trace=False).save(file)
    else:
        torch.save(module.state_dict(), file)
    assert same(Backbone(str(quick), pretrained=str(file)), plain)
    other = architecture(tmp_path / "other", CLIP)
    with pytest.raises(ValueError, match=r"QuickGELU.* backbone\.name=.*-quickgelu"):
        Backbone(str(other), pretrained=str(file))


def test_text_tower_from_another_folder(folder: Path, tmp_path: Path) -> None:
    teacher = Backbone(str(folder), "random")
    nn.init.normal_(teacher.text.token_embedding.weight)
    teacher.logit_scale.data.fill_(4.0)
    student = Backbone(str(folder), "random", text_from=str(teacher.save(tmp_path / "teacher", torch.float32)))
    tokens = student.tokenize(["a red circle"])
    torch.testing.assert_close(student.encode_text(tokens), teacher.encode_text(tokens))
    assert student.logit_scale == teacher.logit_scale
    assert not torch.equal(student.visual.proj, teacher.visual.proj)


def test_no_code_runs_from_a_checkpoint(folder: Path, tmp_path: Path) -> None:
    torch.save({"state_dict": folder}, file := tmp_path / "object.pt")
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        Backbone(str(folder), pretrained=str(file))


def test_position_tables_are_never_stretched(folder: Path, plain: nn.Module) -> None:
    save_file(plain.state_dict(), folder / "open_clip_model.safetensors")
    with pytest.raises(ValueError, match=r"has 16 rows, .* expects 32: set backbone.context_length=16"):
        Backbone(str(folder), context_length=32)
    bigger = CLIP | {"vision_cfg": CLIP["vision_cfg"] | {"image_size": 48}}
    with pytest.raises(ValueError, match=r"visual.positional_embedding is \(17, 64\), .* expects \(37, 64\)"):
        Backbone(str(architecture(folder, bigger)))


def test_saved_folder_loads_here_and_in_open_clip(tmp_path: Path) -> None:
    for name, config in VARIANTS.items():
        first = Backbone(str(architecture(tmp_path / "a", config, mean=[0, 0, 0], std=[1, 1, 1])), "random").eval()
        saved = first.save(tmp_path / name, dtype=torch.float32)
        again, theirs = Backbone(str(saved)).eval(), open_clip.create_model(f"local-dir:{saved}").eval()
        images = torch.rand(2, 3, first.image_size, first.image_size)
        torch.testing.assert_close(again.encode_image(images), first.encode_image(images))
        torch.testing.assert_close(theirs.encode_image(images), first.encode_image(images))
        tokens = first.tokenize(["a red circle", ""])
        torch.testing.assert_close(theirs.encode_text(tokens), first.encode_text(tokens), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_visual_tokens(tmp_path: Path, variant: str) -> None:
    torch.manual_seed(0)
    backbone = Backbone(str(architecture(tmp_path, VARIANTS[variant])), "random").eval()
    images = torch.rand(2, 3, backbone.image_size, backbone.image_size)
    pooled, patches = backbone.visual_tokens(images)
    torch.testing.assert_close(pooled, backbone.encode_image(images), atol=1e-5, rtol=1e-5)
    assert patches.shape == (2, 16 if backbone.embed_dim == 24 and "timm" not in variant else 196, backbone.embed_dim)
    (pooled.sum() + patches.square().sum()).backward()
    idle = [name for name, weight in backbone.visual.named_parameters() if weight.grad is None]
    assert not idle


def test_patch_takes_the_road_of_the_pooled_token(tmp_path: Path) -> None:
    """With average pooling after the norm, the mean of the projected patches is the embedding itself."""
    backbone = Backbone(str(architecture(tmp_path, VARIANTS["average pooling"])), "random").eval()
    pooled, patches = backbone.visual_tokens(torch.rand(2, 3, 32, 32))
    torch.testing.assert_close(patches.mean(dim=1), pooled, atol=1e-5, rtol=1e-5)


def test_resnet_has_no_patch_tokens(tmp_path: Path) -> None:
    resnet = CLIP | {"vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8}}
    backbone = Backbone(str(architecture(tmp_path, resnet)), "random")
    assert backbone.encode_image(torch.rand(2, 3, 32, 32)).shape == (2, 24)
    with pytest.raises(ValueError, match=r"no patch tokens .* Choose a CLIP ViT"):
        backbone.visual_tokens(torch.rand(2, 3, 32, 32))


def test_pictures_of_any_size(folder: Path) -> None:
    backbone = Backbone(str(folder), "random").eval()
    small = torch.rand(2, 3, 32, 32)
    large = small.repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)
    torch.testing.assert_close(backbone.encode_image(large), backbone.encode_image(small), atol=0.1, rtol=0.1)
    edges = torch.zeros(1, 3, 64, 64)
    edges[..., 31:] = 1
    pixels = backbone._pixels(edges) * backbone.std + backbone.mean
    assert pixels.min() >= -1e-6
    assert pixels.max() <= 1 + 1e-6


def test_text_padding_is_skipped_exactly(folder: Path) -> None:
    backbone = Backbone(str(folder), "random").eval()
    tokens = backbone.tokenize(["a circle", "a large red circle above a small blue square", "word " * 99])
    torch.testing.assert_close(backbone.encode_text(tokens[:2]), backbone.model.encode_text(tokens[:2]))
    torch.testing.assert_close(backbone.encode_text(tokens), backbone.model.encode_text(tokens))


def word_tokenizer(folder: Path) -> None:
    """Files of a tokenizer as SigLIP folders carry it: no start token, padded with 1."""
    words = WordLevel({"</s>": 0, "<pad>": 1, "<unk>": 2, "a": 3, "fish": 4}, unk_token="<unk>")
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 0)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(folder)


@pytest.mark.parametrize("kind", ["clip", "hugging face"])
def test_texts_are_cut_at_their_end_token_and_counted(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "model"
    if kind == "clip":
        architecture(folder, CLIP)
        end, padding, marks = 49407, 0, 2
    else:
        architecture(folder, CLIP | {"text_cfg": TEXT | {"hf_tokenizer_name": "none/asked"}})
        word_tokenizer(folder)
        end, padding, marks = 0, 1, 1
    backbone = Backbone(str(folder), "random")
    words = [16 - marks, 17 - marks, 40, 3]
    texts = ["a " * number for number in words]
    tokens = backbone.tokenize(texts)
    assert tokens.shape == (4, 16)
    assert backbone.tokens.cut_share(texts, tokens) == 0.5
    assert backbone.tokens.cut_share(texts[3:], tokens[3:]) == 0
    assert (tokens == end).sum(dim=1).tolist() == [1, 1, 1, 1]
    short = backbone.tokenize(texts, at_most=5)
    assert short.shape == (4, 16)
    assert (short != padding).sum(dim=1).tolist() == [5, 5, 5, 3 + marks]
    assert (short[:, 4] == end).tolist() == [True, True, True, 3 + marks == 5]
    assert torch.equal(backbone.tokenize(texts, at_most=99), tokens)


@pytest.mark.parametrize("stem", PUBLISHED)
def test_published_backbones_are_real(stem: str) -> None:
    """The tag exists, its towers build, and its patches reach the joint space (on the meta device: no memory)."""
    conf = PUBLISHED[stem]
    assert (conf["name"], conf["pretrained"]) in open_clip.list_pretrained()
    with torch.device("meta"):
        backbone = Backbone(conf["name"])
        side = backbone.image_size
        pooled, patches = backbone.visual_tokens(torch.empty(1, 3, side, side))
    assert pooled.shape == (1, backbone.embed_dim)
    assert patches.shape == (
        1,
        (side // 14) ** 2 if "14" in conf["name"] else (side // int(stem[-2:])) ** 2,
        pooled.shape[1],
    )
    assert backbone.context_length == {"siglip-so400m": 16, "siglip-so400m-384": 64}.get(stem, 77)
    published = open_clip.get_pretrained_cfg(conf["name"], conf["pretrained"])
    assert tuple(backbone.preprocess["mean"]) == tuple(published["mean"])


@pytest.mark.parametrize(
    ("name", "pretrained", "message"),
    [
        ("ViT-L-15", None, "neither an open_clip architecture nor a folder.*ViT-L-14"),
        ("local-dir:/nowhere", None, "backbone.name=local-dir:/nowhere .*open_clip_config.json"),
        ("ViT-B-32", "openai", "backbone.name=ViT-B-32-quickgelu"),
        ("ViT-B-32", "nothing", "neither a file nor a tag of ViT-B-32. Its tags: .*laion400m"),
    ],
)
def test_mistakes_name_the_fix(name: str, pretrained: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Backbone(name, pretrained)


def test_unfetchable_weights_name_the_config_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"backbone\.pretrained=/path/to/file"):
        Backbone("ViT-B-32-quickgelu", "openai")


@pytest.mark.parametrize("name", WEIGHT_FILES)
def test_a_file_is_mapped_and_never_changed(folder: Path, plain: nn.Module, name: str) -> None:
    """A model is in memory once: it computes with the file itself, until training changes it, and then its own copy."""
    file = folder / name
    (save_file if file.suffix == ".safetensors" else torch.save)(plain.state_dict(), file)
    backbone = Backbone(str(folder))
    weight, before = backbone.text.token_embedding.weight, file.read_bytes()
    maps = Path("/proc/self/maps").read_text().splitlines()
    mapped = [line.split()[0].split("-") for line in maps if str(file) in line]
    assert any(int(start, 16) <= weight.data_ptr() < int(end, 16) for start, end in mapped)
    assert weight.requires_grad
    weight.data += 1
    assert file.read_bytes() == before
    again = Backbone(str(backbone.save(folder, torch.float32)))  # over the file that it still reads from
    assert torch.equal(again.text.token_embedding.weight, weight)


def test_weights_of_another_type_are_computed_with_in_fp32(folder: Path, plain: nn.Module, tmp_path: Path) -> None:
    torch.save({key: value.bfloat16() for key, value in plain.state_dict().items()}, file := tmp_path / "weights.pt")
    backbone = Backbone(str(folder), pretrained=str(file))
    assert {weight.dtype for weight in backbone.parameters()} == {torch.float32}
    assert torch.equal(backbone.visual.proj, plain.visual.proj.bfloat16().float())
