"""LoRA on both kinds of visual towers against weights put together by hand, and what its checkpoints hold."""

import copy

import pytest
import torch
from architectures import VARIANTS, architecture
from fits import fit
from small import batch, build
from torch import nn

from clipfix.models.adapters import add_lora, merge_adapters
from clipfix.models.clip import Backbone
from clipfix.training.checkpoints import load_repair

LORA = {"rank": 4, "alpha": 6}
SGD = {"name": "SGD", "lr": 1.0, "momentum": 0.9}


@pytest.fixture
def make(clip_folder, generator_folder):
    def made(*groups):
        if "trainable=tower" in groups:
            return build("diva", clip_folder, generator_folder, *groups, optimizer=SGD, caption_weight=1.0)
        settings = {"trainable": LORA, "optimizer": SGD, "caption_weight": 1.0}
        return build("diva", clip_folder, generator_folder, "trainable=lora", *groups, **settings)

    return made


def by_hand(plain: nn.Module, adapted: nn.Module) -> nn.Module:
    """The plain tower with W + alpha / rank * B A in each matrix, adapters found by the names that peft gave them."""
    tower, trained = copy.deepcopy(plain), dict(adapted.named_parameters())
    for name, a in trained.items():
        if ".lora_A." in name:
            weight = name.split(".lora_A.")[0] + ".weight"
            weight = weight.replace("in_proj.weight", "in_proj_weight")
            tower.get_parameter(weight).data += 6 / 4 * trained[name.replace("lora_A", "lora_B")] @ a
    return tower


@pytest.mark.parametrize("variant", VARIANTS)
def test_adapters_start_at_the_plain_tower_then_equal_weights_put_together_by_hand(variant, tmp_path):
    torch.manual_seed(0)
    plain = Backbone(str(architecture(tmp_path, VARIANTS[variant])), "random").requires_grad_(False)
    backbone = copy.deepcopy(plain)
    parts = add_lora(backbone.visual, **LORA)
    for part in parts:
        part.requires_grad_(True)
    images = torch.rand(2, 3, plain.image_size, plain.image_size)
    for mode in (True, False):
        for found, expected in zip(
            backbone.train(mode).visual_tokens(images), plain.train(mode).visual_tokens(images), strict=True
        ):
            torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)

    adapted = sum(isinstance(module, nn.Linear) for module in plain.visual.modules())
    adapted += sum(isinstance(module, nn.MultiheadAttention) for module in plain.visual.modules())  # its in_proj
    assert len(parts) == 2 * adapted > 0
    assert {id(p) for p in parts} == {id(p) for p in backbone.parameters() if p.requires_grad}
    for part in parts:
        nn.init.normal_(part, std=0.1)
    by_hands = copy.deepcopy(plain)
    by_hands.model.visual = by_hand(plain.visual, backbone.visual)
    for found, expected in zip(backbone.visual_tokens(images), by_hands.visual_tokens(images), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)
    assert not torch.allclose(backbone.encode_image(images), plain.encode_image(images), atol=1e-2)

    weights = merge_adapters(backbone, {name: p.detach() for name, p in backbone.named_parameters() if p.requires_grad})
    assert len(weights) == adapted
    for name, weight in weights.items():
        torch.testing.assert_close(weight, by_hands.get_parameter(name))


def test_gradients_of_adapters_are_those_of_the_weight_through_both_factors(make):
    """dL/dB = s dL/dW A^T and dL/dA = s B^T dL/dW, with dL/dW from a plain tower of the merge_adapters weights."""
    method, inputs = make("anchor=features"), batch(3)
    plain = copy.deepcopy(method.anchor.original)
    for name, p in method.backbone.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(p, std=0.1)
    plain.model.visual = by_hand(plain.visual, method.backbone.visual).requires_grad_(True)
    for clip in (method.backbone, plain):
        clip.encode_image(inputs["image"]).square().sum().backward()
    trained = {name: p for name, p in method.backbone.named_parameters() if p.requires_grad}
    for name, a in trained.items():
        if ".lora_A." in name:
            b = trained[name.replace("lora_A", "lora_B")]
            weight = f"{name.split('.lora_A.')[0]}.weight".replace("in_proj.weight", "in_proj_weight")
            gradient = plain.get_parameter(weight).grad
            torch.testing.assert_close(b.grad, 1.5 * gradient @ a.T, rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(a.grad, 1.5 * b.T @ gradient, rtol=1e-3, atol=1e-4)


def test_base_stays_to_the_bit_and_the_checkpoint_is_a_plain_clip(make, clip_folder, tmp_path):
    method, inputs = make("anchor=features"), batch(3)
    start = {name: tensor.clone() for name, tensor in method.backbone.state_dict().items()}
    plain = method.anchor.original  # taken before the adapters were put in
    assert not [name for name, _ in plain.named_parameters() if "lora" in name]
    unchanged = copy.deepcopy(plain)
    fit(method, tmp_path, steps=3)
    trained = {name for name in method.backbone.state_dict() if ".lora_" in name}
    after = method.backbone.state_dict()
    assert all(torch.equal(after[name], start[name]) for name in after.keys() - trained)
    assert all(not torch.equal(after[name], start[name]) for name in trained)

    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    clip = {name.removeprefix("backbone.") for name in saved["state_dict"] if name.startswith("backbone.")}
    matrices = ("in_proj_weight", "out_proj.weight", "c_fc.weight", "c_proj.weight")
    assert clip == {
        name for name, _ in unchanged.visual.named_parameters(prefix="model.visual") if name.endswith(matrices)
    }
    assert saved["training"].keys() == method.trained_names()
    load_repair(unchanged, str(tmp_path / "last.ckpt"))
    torch.testing.assert_close(
        unchanged.eval().encode_image(inputs["image"]), method.backbone.eval().encode_image(inputs["image"])
    )
    assert not torch.allclose(unchanged.encode_image(inputs["image"]), plain.encode_image(inputs["image"]), atol=1e-2)


def test_resumed_lora_equals_uninterrupted(make, tmp_path):
    whole, rest = make(), make()
    fit(whole, tmp_path / "whole", steps=4)
    fit(make(), tmp_path / "parts", steps=2)
    fit(rest, tmp_path / "parts", steps=4, resume=tmp_path / "parts" / "last.ckpt")
    for (name, left), right in zip(whole.named_parameters(), rest.parameters(), strict=True):
        assert torch.equal(left, right), name


def test_lora_does_not_resume_as_something_else(make, tmp_path):
    fit(make(), tmp_path, steps=1)
    with pytest.raises(ValueError, match="config_yaml"):
        fit(make("trainable=tower"), tmp_path, steps=2, resume=tmp_path / "last.ckpt")
