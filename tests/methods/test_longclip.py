"""Long-CLIP as a method: what moves, what may not, and that its switches do what they say."""

import open_clip
import pytest
import torch
import torch.nn.functional as F
from small import batch, build

from clipfix.functional.components import principal_reconstruction
from clipfix.functional.contrastive import contrastive_loss
from clipfix.functional.positions import stretch
from clipfix.methods.longclip import LongCLIP, pad_prefix
from clipfix.models.clip import Backbone
from clipfix.training.checkpoints import load_repair


@pytest.fixture
def make(clip_folder, generator_folder):
    return lambda **overrides: build("longclip", clip_folder, generator_folder, **overrides)


def total(method: LongCLIP, inputs: dict) -> torch.Tensor:
    method.seed_draws(0)
    return torch.stack(list(method.loss(inputs).values())).sum()


def gradients(method: LongCLIP, inputs: dict) -> dict[str, torch.Tensor]:
    total(method, inputs).backward()
    return {name: p.grad for name, p in method.named_parameters()}


def test_text_tower_reads_the_stretched_length(make):
    original = make(keep_tokens=6, ratio=1).backbone
    stretched = make(keep_tokens=6, ratio=3).backbone
    assert stretched.context_length == 6 + 3 * 10
    expected = stretch(original.text.positional_embedding, 6, 3)
    assert torch.equal(stretched.text.positional_embedding, expected)
    words = ["a red fish", "two blue stars"]  # within the kept rows: read as before
    assert torch.equal(stretched.encode_text(stretched.tokenize(words)), original.encode_text(original.tokenize(words)))
    assert stretched.tokenize(["star " * 30]).shape == (1, 36)


def test_losses_are_those_of_the_paper(make):
    method, inputs = make(), batch(8)
    method.seed_draws(0)
    terms = method.loss(inputs)
    clip = method.backbone
    image = F.normalize(clip.encode_image(inputs["image"]), dim=-1)
    long, short = (F.normalize(clip.encode_text(clip.tokenize(inputs[key])), dim=-1) for key in ("long", "caption"))
    assert clip.logit_scale.exp().item() == pytest.approx(100)
    for name, pictures, texts in (("long", image, long), ("short", principal_reconstruction(image, 3), short)):
        expected = contrastive_loss(pictures, texts, pictures, texts, torch.tensor(100.0), 0, label_smoothing=0.1)
        torch.testing.assert_close(terms[name], expected, atol=1e-4, rtol=1e-5)


OPTIMIZERS = [
    {"name": "AdamW", "weight_decay": 0.5},
    {"name": "Adam", "weight_decay": 0.5},
    {"name": "SGD", "momentum": 0.9, "weight_decay": 0.5, "nesterov": True},
    {"name": "Adagrad", "weight_decay": 0.5},
    {"name": "RMSprop", "momentum": 0.9, "weight_decay": 0.5},
]


@pytest.mark.parametrize("settings", OPTIMIZERS, ids=lambda settings: settings["name"])
def test_kept_rows_do_not_move_under_any_optimizer(make, settings):
    method = make(optimizer={"lr": 0.1, "betas": None, "eps": None, **settings})
    optimizer = method.configure_optimizers()["optimizer"]
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.5  # as an optimizer would that knows no groups
    table = method.backbone.text.positional_embedding
    before = table.detach().clone()
    for seed in range(3):
        optimizer.zero_grad()
        total(method, batch(4, seed)).backward()
        assert (table.grad[:6] == 0).all()
        optimizer.step()
    assert torch.equal(table[:6], before[:6])
    assert not torch.isclose(table[6:], before[6:]).any(dim=1).all()


def test_at_ratio_one_every_row_trains(make):
    method = make(keep_tokens=6, ratio=1)
    assert method.backbone.context_length == 16
    assert (gradients(method, batch(4))["backbone.model.text.positional_embedding"][:6] != 0).any(dim=1).all()


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_chunks_change_neither_loss_nor_gradients(make, chunk):
    inputs = batch(8)
    whole, parts = make(), make(chunk=chunk)
    torch.testing.assert_close(total(parts, inputs), total(whole, inputs), atol=1e-5, rtol=1e-5)
    expected, found = gradients(whole, inputs), gradients(parts, inputs)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5 * float(gradient.abs().max()) + 1e-8, rtol=1e-4)


def test_chunks_run_the_towers_on_few_rows(make, monkeypatch):
    method, seen = make(chunk=3), []
    encode = method.backbone.encode_image
    monkeypatch.setattr(method.backbone, "encode_image", lambda rows: seen.append(len(rows)) or encode(rows))
    total(method, batch(8)).backward()
    assert seen == [3, 3, 2, 2, 3, 3]  # the backward pass runs them again, last first


def test_switches(make):
    inputs = batch(8)
    assert set(make(short_weight=0.0).loss(inputs)) == {"long"}
    half, whole = make(short_weight=0.5).loss(inputs), make().loss(inputs)
    torch.testing.assert_close(2 * half["short"], whole["short"])
    assert make(components=None).loss(inputs)["short"] != whole["short"]
    alone = make(components_over="rank").loss(inputs)["short"]  # one rank holds the whole batch
    torch.testing.assert_close(alone, whole["short"])
    assert make(start_scale=None).backbone.logit_scale.exp().item() == pytest.approx(1 / 0.07)
    for key, value in {"components": 0, "chunk": 0, "ratio": 0, "keep_tokens": 15}.items():
        with pytest.raises(Exception, match=rf"method\.{key} is {value}"):
            make(**{key: value})


def test_share_of_cut_texts_is_noted(make):
    """16 places, two of them for start and end: of 13, 14, 15 and 30 words the last two do not fit."""
    method, inputs = make(keep_tokens=6, ratio=1), batch(4)
    inputs |= {"long": ["star " * words for words in (13, 14, 15, 30)]}
    (encode,) = method.needs.encode
    method.loss(inputs | encode(inputs))
    assert method.notes == {"data/long_cut": 0.5, "data/short_cut": 0.0}


def test_prefix_padding_moves_texts_within_the_context():
    tokens = torch.tensor([[90, 5, 6, 99, 0, 0, 0], [90, 5, 99, 0, 0, 0, 0], [90, 1, 2, 3, 4, 5, 99]])
    moved = pad_prefix(tokens, torch.tensor([0.999, 0.5, 0.999]))
    assert moved.tolist() == [[90, 0, 0, 0, 5, 6, 99], [90, 0, 0, 5, 99, 0, 0], [90, 1, 2, 3, 4, 5, 99]]
    assert torch.equal(pad_prefix(tokens, torch.zeros(3)), tokens)


def test_prefix_padding_trains_late_positions(make):
    reached = {}
    for padding in (False, True):
        found = gradients(make(prefix_padding=padding), batch(8) | {"long": ["a fish"] * 8})
        reached[padding] = int((found["backbone.model.text.positional_embedding"] != 0).any(dim=1).sum())
    assert reached[False] < 4 < 15 < reached[True]


def test_trained_model_is_an_ordinary_one(make, clip_folder, tmp_path):
    """open_clip reads the saved folder, and a checkpoint finds its longer table on the backbone it came from."""
    method = make()
    with torch.no_grad():
        method.backbone.text.positional_embedding[6:] += 0.1
    words = ["star " * 25, "a fish"]
    expected = method.backbone.encode_text(method.backbone.tokenize(words))
    folder = method.backbone.save(tmp_path / "model", torch.float32)
    loaded, _ = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(words)
    torch.testing.assert_close(loaded.encode_text(tokens), expected, atol=1e-5, rtol=1e-5)

    torch.save({"state_dict": method.state_dict()}, tmp_path / "last.ckpt")
    again = Backbone(clip_folder, pretrained="random")
    load_repair(again, str(tmp_path / "last.ckpt"))
    torch.testing.assert_close(again.encode_text(again.tokenize(words)), expected)
