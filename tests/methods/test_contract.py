"""What every method promises, found by listing conf/method/: a new yaml file is tested here without an edit."""

import inspect
import math

import pytest
import torch
from fits import fit
from hydra.utils import get_class
from omegaconf import OmegaConf
from small import CONF, METHODS, batch, build, composed

from clipfix.methods.base import Method
from clipfix.training.phases import Training, parameter_groups
from clipfix.training.schedules import Cosine, Steps


@pytest.fixture(params=METHODS)
def method(request, clip_folder, generator_folder) -> Method:
    return build(request.param, clip_folder, generator_folder)


@pytest.mark.parametrize("name", METHODS)
def test_yaml_binds_to_the_constructor(name):
    """Config keys are the constructor's arguments, all of them, and no scientific value hides in a default."""
    config = OmegaConf.to_container(composed(name, ()).method)
    signature = inspect.signature(get_class(config.pop("_target_")).__init__)
    config.pop("_convert_")
    arguments = {k: p for k, p in signature.parameters.items() if k not in ("self", "backbone", "training")}
    assert config.keys() == arguments.keys() | Training.__annotations__.keys()
    assert all(p.default is inspect.Parameter.empty for p in arguments.values())
    assert len(arguments) <= 10


def test_options_of_parts_bind_to_their_constructors():
    """Each file of a group of parts gives all arguments of the class that it chooses, and nothing else."""
    found = 0
    for group in ("condition", "patches", "timesteps", "feedback", "anchor", "trainable", "schedule", "objective"):
        for path in (CONF / group).glob("*.yaml"):
            node = OmegaConf.load(path)
            if "_target_" not in node:  # an option that builds on another
                continue
            arguments = set(inspect.signature(get_class(node["_target_"])).parameters) - {"args", "kwargs"}
            given = {str(key) for key in node} - {"_target_", "defaults"}
            given |= {entry.partition("@")[2] for default in node.get("defaults", ()) for entry in default}
            assert given == arguments, path
            found += 1
    assert found > 15


def test_loss_is_named_finite_terms_and_reaches_every_trained_weight(method):
    """It reads no text that it does not declare."""
    method.seed_draws(0)
    terms = method.loss({name: part for name, part in batch(4).items() if name in ("image", *method.needs.texts)})
    assert terms
    assert all(term.shape == () and term.isfinite() for term in terms.values())
    sum(terms.values()).backward()
    without = [n for n, p in method.named_parameters() if p.requires_grad and p.grad is None]
    assert not without, f"trained but out of the loss's reach (DDP would hang): {without}"
    assert all(p.grad is None for p in method.parameters() if not p.requires_grad)


def test_loss_repeats_for_the_same_draws_and_differs_for_others(method):
    values = []
    for step in (0, 0, 1):
        method.seed_draws(step)
        fresh = method.ranks.generator.get_state()
        values.append(torch.stack(list(method.loss(batch(4)).values())).sum().item())
    draws = not torch.equal(method.ranks.generator.get_state(), fresh)
    assert values[0] == values[1]
    assert (values[2] != values[0]) == draws


def test_frozen_is_bit_identical_and_trained_moves(method, tmp_path):
    before = {name: p.detach().clone() for name, p in method.named_parameters()}
    fit(method, tmp_path, steps=3)
    moved = {name for name, p in method.named_parameters() if not torch.equal(p, before[name])}
    trained = method.trained_names()
    assert moved <= trained
    assert len(moved) > len(trained) / 2


@pytest.mark.parametrize("train", [["visual"], ["visual", "logit_scale"]])
def test_temperature_is_limited_where_it_trains_and_untouched_where_not(train, clip_folder, generator_folder, tmp_path):
    method = build("finetune", clip_folder, generator_folder, train=train)
    with torch.no_grad():
        method.backbone.logit_scale.fill_(4.7)
    fit(method, tmp_path, steps=1)
    assert method.backbone.logit_scale.item() == pytest.approx(math.log(100) if "logit_scale" in train else 4.7)


@pytest.mark.parametrize("name", METHODS)
def test_resumed_equals_uninterrupted(name, clip_folder, generator_folder, tmp_path):
    whole = build(name, clip_folder, generator_folder)
    fit(whole, tmp_path / "whole", steps=4)
    fit(build(name, clip_folder, generator_folder), tmp_path / "parts", steps=2)
    rest = build(name, clip_folder, generator_folder)
    fit(rest, tmp_path / "parts", steps=4, resume=tmp_path / "parts" / "last.ckpt")
    for (key, left), right in zip(whole.named_parameters(), rest.parameters(), strict=True):
        assert torch.equal(left, right), key


def test_checkpoint_holds_the_trained_weights_alone(method, tmp_path):
    method.config_yaml = "seed: 0\n"
    fit(method, tmp_path, steps=1)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert saved["state_dict"].keys() == saved["training"].keys() == method.trained_names()
    assert all(saved["training"][name].data_ptr() == tensor.data_ptr() for name, tensor in saved["state_dict"].items())
    assert saved["config_yaml"] == "seed: 0\n"


def test_checkpoint_of_another_config_is_refused(clip_folder, generator_folder, tmp_path):
    fit(build("finetune", clip_folder, generator_folder, train=["visual"]), tmp_path, steps=1)
    other = build("finetune", clip_folder, generator_folder, train=["text"])
    with pytest.raises(ValueError, match="config_yaml"):
        fit(other, tmp_path, steps=2, resume=tmp_path / "last.ckpt")
    wider = build("finetune", clip_folder, generator_folder, train=["visual"])
    wider.backbone.model.visual.proj = torch.nn.Parameter(torch.zeros(32, 99))
    with pytest.raises(ValueError, match=r"1 differ, e\.g\. backbone\.model\.visual\.proj"):
        fit(wider, tmp_path, steps=2, resume=tmp_path / "last.ckpt")


def test_norms_biases_scalars_and_tables_do_not_decay(method):
    decay = next(group["params"] for group in parameter_groups(method) if "weight_decay" not in group)
    kept = next(group["params"] for group in parameter_groups(method) if group.get("weight_decay") == 0.0)
    names = {id(p): n for n, p in method.named_parameters()}
    assert all(p.ndim >= 2 and "positional_embedding" not in names[id(p)] for p in decay)
    assert {names[id(p)] for p in decay + kept} == {n for n, p in method.named_parameters() if p.requires_grad}


def test_schedule_warms_up_then_falls_along_a_cosine():
    """4 warm-up steps of 12: quarters, then cos from 1 through 1/2 in the middle of the other 8 to 0."""
    factors = [Cosine(4, floor=0.0).factor(step, 12) for step in (0, 1, 3, 4, 8, 12, 20)]
    assert factors == pytest.approx([0.25, 0.5, 1.0, 1.0, 0.5, 0.0, 0.0])


def test_schedules_end_where_they_say():
    assert Cosine(0, floor=0.1).factor(12, 12) == pytest.approx(0.1)
    drops = Steps(2, at=[0.5, 0.75], factor=0.1)
    assert [drops.factor(step, 10) for step in (0, 1, 2, 5, 6, 7, 8, 9)] == pytest.approx(
        [0.5, 1, 1, 1, 0.1, 0.1, 0.01, 0.01]
    )


def test_start_runs_once_before_the_first_step_on_batches_that_are_trained_on_later(
    clip_folder, generator_folder, tmp_path
):
    started, trained = [], []

    def made() -> Method:
        method = build("finetune", clip_folder, generator_folder)
        method.start = lambda batches: started.append((method.batches_seen, next(iter(batches))["image"].sum()))
        loss = method.loss
        method.loss = lambda batch: trained.append(batch["image"].sum()) or loss(batch)
        return method

    fit(made(), tmp_path, steps=2)
    assert started == [(0, trained[0])]
    fit(made(), tmp_path, steps=3, resume=tmp_path / "last.ckpt")
    assert len(started) == 1
    assert trained[2] == batch(4, 2)["image"].sum()
