"""WiSE against means by hand: what is scored, saved and resumed, for every method."""

import copy
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from small import METHODS, batch, build
from torch import Tensor
from torch.utils.data import DataLoader

from clipfix.evals.base import Benchmark, Scores
from clipfix.results.selection import Selection
from clipfix.training.checkpoints import load_repair
from clipfix.training.weight_averaging import WiSE

LORA: dict[str, Any] = {
    "trainable": {"rank": 4, "alpha": 4},
    "caption_weight": 1.0,
    "optimizer": {"name": "SGD", "lr": 5.0},
}


class Looks(Benchmark):
    """Keeps what it was shown, and likes the first best."""

    def __init__(self) -> None:
        self.shown: list[dict[str, Tensor]] = []

    def score(self, features) -> Scores:
        self.shown.append({name: p.detach().clone() for name, p in features.model.named_parameters()})
        return Scores({"score": -float(len(self.shown))})


def fit(method, folder, steps: int, alpha: float | None, resume=None) -> list[dict[str, Tensor]]:
    """A real Trainer with a look at the selection split after every step."""

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return (batch(4, seed) for seed in range(method.batches_seen, 100))

    looks = Looks()
    trainer = L.Trainer(
        max_steps=steps, max_epochs=-1, accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False, num_sanity_val_steps=0, val_check_interval=1,
        check_val_every_n_epoch=None,
        callbacks=[
            Selection({"looks": looks}, "looks/score"),
            ModelCheckpoint(folder, filename="best", monitor="selection/looks/score", mode="max"),
            *([] if alpha is None else [WiSE(alpha)]),
        ],
    )  # fmt: skip
    validation = DataLoader([batch(4, 200)], batch_size=None)
    trainer.fit(method, DataLoader(Stream(), batch_size=None), validation, ckpt_path=resume, weights_only=True)
    trainer.save_checkpoint(folder / "last.ckpt")
    return looks.shown if resume else looks.shown[1:]  # what it was shown before training is the original


def parameters(method) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in method.named_parameters()}


@pytest.mark.parametrize("name", METHODS)
def test_half_is_the_mean_and_training_does_not_notice(name, clip_folder, generator_folder, tmp_path):
    settings = {"optimizer": {"name": "SGD", "lr": 0.1}}
    method, alone = (build(name, clip_folder, generator_folder, **settings) for _ in range(2))
    start, names = parameters(method), method.trained_names()
    looks, trained = fit(method, tmp_path / "wise", 2, alpha=0.5), fit(alone, tmp_path / "alone", 2, alpha=None)
    after = method.state_dict()
    assert all(torch.equal(p, after[key]) for key, p in alone.named_parameters())

    assert len(looks) == len(trained) == 2
    for shown, weights in zip(looks, trained, strict=True):
        for key, p in weights.items():
            mean = (p.double() + start[f"backbone.{key}"].double()) / 2
            torch.testing.assert_close(shown[key].double(), mean, rtol=1e-6, atol=1e-7)  # a rounding or two
            if torch.equal(p, start[f"backbone.{key}"]):
                assert torch.equal(shown[key], p)
        moved = {key for key, p in weights.items() if not torch.allclose(p, start[f"backbone.{key}"], atol=1e-5)}
        assert moved or name == "denoise"  # which trains another model

    saved = torch.load(tmp_path / "wise" / "last.ckpt", weights_only=True)
    assert saved["state_dict"].keys() == saved["training"].keys() == names
    for key in names:
        shown = looks[-1][key.removeprefix("backbone.")] if key.startswith("backbone.") else after[key]
        assert torch.equal(saved["state_dict"][key], shown), key
        assert torch.equal(saved["training"][key], after[key]), key
    best = torch.load(tmp_path / "wise" / "best.ckpt", weights_only=True)
    assert best["global_step"] == 1
    for key in names:
        if key.startswith("backbone."):
            assert torch.equal(best["state_dict"][key], looks[0][key.removeprefix("backbone.")]), key


def test_one_is_the_trained_model(clip_folder, generator_folder, tmp_path):
    method = build("finetune", clip_folder, generator_folder, optimizer={"name": "SGD", "lr": 0.1})
    looks = fit(method, tmp_path, 2, alpha=1)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    for name, p in method.backbone.named_parameters():
        assert torch.equal(looks[-1][name], p), name
        assert torch.equal(saved["state_dict"][f"backbone.{name}"], p), name


@pytest.mark.parametrize(
    "name", ["longclip", pytest.param("diva", marks=pytest.mark.slow), pytest.param("lora", marks=pytest.mark.slow)]
)
def test_resumed_equals_uninterrupted(name, clip_folder, generator_folder, tmp_path):
    groups, overrides = (["trainable=lora"], LORA) if name == "lora" else ([], {})
    kind = "diva" if name == "lora" else name
    whole, part, rest = (build(kind, clip_folder, generator_folder, *groups, **overrides) for _ in range(3))
    seen = fit(whole, tmp_path / "whole", 4, alpha=0.3)
    fit(part, tmp_path / "parts", 2, alpha=0.3)
    again = fit(rest, tmp_path / "parts", 4, alpha=0.3, resume=tmp_path / "parts" / "last.ckpt")
    for (key, left), right in zip(whole.named_parameters(), rest.parameters(), strict=True):
        assert torch.equal(left, right), key
    for key, shown in seen[-1].items():
        assert torch.equal(shown, again[-1][key]), key
    left, right = (torch.load(tmp_path / run / "last.ckpt", weights_only=True) for run in ("whole", "parts"))
    for key, weight in left["state_dict"].items():
        assert torch.equal(weight, right["state_dict"][key]), key


def test_a_run_without_wise_resumes_from_the_trained_weights(clip_folder, generator_folder, tmp_path):
    whole, part, rest = (build("finetune", clip_folder, generator_folder) for _ in range(3))
    fit(whole, tmp_path / "whole", 4, alpha=None)
    fit(part, tmp_path / "parts", 2, alpha=0.3)
    fit(rest, tmp_path / "parts", 4, alpha=None, resume=tmp_path / "parts" / "last.ckpt")
    assert all(torch.equal(p, parameters(whole)[name]) for name, p in rest.named_parameters())


def test_with_lora_the_change_is_scaled(clip_folder, generator_folder, tmp_path):
    """Merged weights lie between the original and those of a run without WiSE, and the scored model has them."""
    method, alone = (
        build("diva", clip_folder, generator_folder, "trainable=lora", "anchor=features", **LORA) for _ in range(2)
    )
    plain = copy.deepcopy(method.anchor.original)
    looks, full = fit(method, tmp_path / "wise", 2, alpha=0.25), fit(alone, tmp_path / "alone", 2, alpha=None)
    wise, trained = (torch.load(tmp_path / run / "last.ckpt", weights_only=True) for run in ("wise", "alone"))
    for name, p in plain.named_parameters():
        key = f"backbone.{name}"
        if key in trained["state_dict"]:
            mixed = 0.25 * trained["state_dict"][key] + 0.75 * p
            torch.testing.assert_close(wise["state_dict"][key], mixed, rtol=1e-5, atol=1e-7)
    assert all(torch.equal(p, full[-1][key]) for key, p in looks[-1].items() if ".lora_A." in key)

    load_repair(plain, str(tmp_path / "wise" / "last.ckpt"))
    method.backbone.load_state_dict(looks[-1], strict=False)
    image = batch(3)["image"]
    assert not torch.allclose(plain.encode_image(image), method.anchor.original.encode_image(image), atol=1e-3)
    torch.testing.assert_close(plain.encode_image(image), method.backbone.encode_image(image))


@pytest.mark.parametrize("alpha", [0, -0.5, 1.5, "half"])
def test_shares_outside_zero_to_one_are_refused(alpha):
    with pytest.raises(ValueError, match="above 0 and at most 1"):
        WiSE(alpha)
