"""Packed against padded: open_clip's own `encode_text` on the full context is the independent side throughout."""

import json
from pathlib import Path

import pytest
import torch
from packed import END, LENGTHS, START, TEXT, TOWERS, VISION, build, gradients, texts
from torch import Tensor, nn

from clipfix.models import clip as module
from clipfix.models.clip import Backbone
from clipfix.models.packed_text import encode_packed


def assert_same_gradients(text: nn.Module, ours: Tensor, theirs: Tensor, tolerance: float = 1e-4) -> None:
    expected = gradients(text, theirs)
    for name, gradient in gradients(text, ours).items():
        size = expected[name].norm()
        assert size > 1e-3, name  # else rounding would be all there is to compare
        assert (gradient - expected[name]).norm() <= tolerance * size, name


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("tower", TOWERS)
def test_features_and_gradients_are_those_of_the_padded_tower(tower: str, lengths: str) -> None:
    model, tokens = build(**TOWERS[tower]), texts(LENGTHS[lengths])
    theirs, ours = model.encode_text(tokens), encode_packed(model.text, tokens)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert_same_gradients(model.text, ours, theirs)


def test_the_features_tell_texts_apart() -> None:
    """Else equality would say nothing: words, order and length all move the feature far beyond any tolerance here."""
    model = build()
    tokens = texts([40]).repeat(4, 1)
    tokens[1, 5] = tokens[1, 5] % (START - 1) + 1
    tokens[2, [5, 6]] = tokens[2, [6, 5]]
    tokens[3, 20:] = texts([20])[0, :60].index_fill(0, torch.tensor(0), END)
    distances = torch.pdist(encode_packed(model.text, tokens))
    assert distances.min() > 0.01


def test_only_what_stands_before_the_end_counts() -> None:
    model, tokens = build(), texts([10, 40, 70])
    before, behind = tokens.clone(), tokens.clone()
    before[1, 20] = before[1, 20] % (START - 1) + 1
    behind[1, 45] = 5
    features = encode_packed(model.text, tokens)
    assert torch.equal(encode_packed(model.text, behind), features)
    moved = (encode_packed(model.text, before) - features).abs().amax(dim=1)
    assert moved[1] > 0.01
    assert moved[[0, 2]].max() < 1e-6


def test_zeros_before_the_end_are_read() -> None:
    """Prefix padding puts zeros between start and words: they are tokens like any other."""
    model, tokens = build(), texts([50, 30])
    tokens[0, 1:20] = 0
    torch.testing.assert_close(encode_packed(model.text, tokens), model.encode_text(tokens), atol=1e-5, rtol=1e-5)


def test_no_padding_is_computed() -> None:
    model, seen = build(), []
    for block in model.text.transformer.resblocks:
        block.mlp.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    encode_packed(model.text, texts([10, 40, 70]))
    assert seen == [120, 120, 3]


def test_autocast_bf16() -> None:
    model, tokens = build(), texts(LENGTHS["mixed"])
    exact = model.encode_text(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        theirs, ours = model.encode_text(tokens), encode_packed(model.text, tokens)
    assert ours.dtype == theirs.dtype == torch.bfloat16
    scale = exact.abs().max()
    assert (ours - exact).abs().max() < 0.05 * scale
    assert (ours - theirs).abs().max() < 0.05 * scale
    assert_same_gradients(model.text, ours, exact, tolerance=0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_tower_of_another_type(dtype: torch.dtype) -> None:
    model, tokens = build().to(dtype), texts(LENGTHS["mixed"])
    theirs, ours = model.encode_text(tokens), encode_packed(model.text, tokens)
    assert ours.dtype == dtype
    tolerance = 0.05 if dtype is torch.bfloat16 else 1e-12
    assert (ours - theirs).abs().max() < tolerance * theirs.abs().max()


def test_attention_without_bias() -> None:
    model, tokens = build(), texts(LENGTHS["mixed"])
    for block in model.text.transformer.resblocks:
        block.attn = nn.MultiheadAttention(32, 4, bias=False, batch_first=True)
    theirs, ours = model.encode_text(tokens), encode_packed(model.text, tokens)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert_same_gradients(model.text, ours, theirs)


def test_grad_checkpointing_runs_blocks_again() -> None:
    model, tokens, runs = build(), texts(LENGTHS["mixed"]), []
    theirs = model.encode_text(tokens)
    expected = gradients(model.text, theirs)
    model.text.set_grad_checkpointing()
    model.text.transformer.resblocks[0].ln_1.register_forward_pre_hook(lambda *_: runs.append(1))
    ours = encode_packed(model.text, tokens)
    assert len(runs) == 1
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    for name, gradient in gradients(model.text, ours).items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-4, rtol=1e-4)
    assert len(runs) == 2


def test_frozen_towers() -> None:
    model, tokens = build(), texts(LENGTHS["mixed"])
    theirs = model.encode_text(tokens)
    model.text.requires_grad_(False)
    ours = encode_packed(model.text, tokens)
    assert not ours.requires_grad
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    model.text.transformer.resblocks[-1].requires_grad_(True)  # open_clip's lock leaves the last layers open
    assert_same_gradients(model.text, encode_packed(model.text, tokens), model.encode_text(tokens))


@pytest.mark.parametrize(
    ("changes", "packs"),
    [({}, True), ({"qk_norm": True}, False), ({"no_causal_mask": True}, False), ({"proj_bias": True}, False)],
)
def test_backbone_packs_the_towers_it_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict, packs: bool
) -> None:
    config = {"embed_dim": 24, "vision_cfg": VISION, "text_cfg": TEXT | changes}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    backbone, calls = Backbone(str(tmp_path), "random"), []
    for parameter in backbone.text.parameters():
        nn.init.normal_(parameter, std=0.3)
    monkeypatch.setattr(module, "encode_packed", lambda *inputs: calls.append(1) or encode_packed(*inputs))
    tokens = texts([12, 50, 3])
    ours, theirs = backbone.encode_text(tokens), backbone.model.encode_text(tokens)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert bool(calls) == packs
