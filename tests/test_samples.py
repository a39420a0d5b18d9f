"""What the generator makes of each condition: drawn from the right weights at the right time, and without a trace."""

import random
import sys
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
import yaml
from hydra.utils import instantiate
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from shards import encoded, pack
from small import CONF, batch, build
from torch.utils.data import DataLoader
from torchvision.transforms.functional import to_pil_image, to_tensor

from clipfix.__main__ import main
from clipfix.results.pictures import diva as samples
from clipfix.results.pictures.diva import Reconstructions

PICTURES = 3
# A few steps must change what is drawn.
FAST = {"optimizer": {"name": "SGD", "lr": 10.0}, "schedule": {"warmup_steps": 0}}


@pytest.fixture
def shard(tmp_path):
    pictures = [to_pil_image(image) for image in batch(PICTURES + 2)["image"]]
    return str(
        pack(tmp_path / "selection.tar", {f"{i}": {"png": encoded(p), "txt": ""} for i, p in enumerate(pictures)})
    )


@pytest.fixture
def drawn(monkeypatch):
    """The cells of every picture that was saved."""
    cells = []
    gallery = samples.gallery
    monkeypatch.setattr(samples, "gallery", lambda found, **layout: cells.append(found) or gallery(found, **layout))
    return cells


@pytest.fixture
def make(clip_folder, generator_folder):
    return lambda **overrides: build("diva", clip_folder, generator_folder, **FAST, **overrides)


def callback(folder, shard, **settings):
    return Reconstructions(str(folder), shard, **({"count": PICTURES, "steps": 2, "guidance": 3.0} | settings))


def fit(method, folder, steps, *callbacks, resume=None):
    """Validates after every second step."""
    trainer = L.Trainer(
        max_steps=steps, accelerator="cpu", logger=False, val_check_interval=2, num_sanity_val_steps=0,
        callbacks=[ModelCheckpoint(folder, filename="last", save_last=False, every_n_train_steps=2), *callbacks],
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    torch.manual_seed(0)
    train = DataLoader([batch(4, seed) for seed in range(method.batches_seen, 20)], batch_size=None)
    trainer.fit(method, train, DataLoader([batch(4, 99)], batch_size=None), ckpt_path=resume, weights_only=True)
    return trainer


def expected(method):
    """The same by hand: the first pictures, their condition, noise of seed 0."""
    with torch.no_grad():
        method.eval().seed_draws(0)
        images = torch.stack([to_tensor(to_pil_image(image)) for image in batch(PICTURES + 2)["image"][:PICTURES]])
        condition = method.condition(*method.backbone.visual_tokens(images))
        null = method.diffusion.condition([""])[0]
        return method.diffusion.sample(condition, null, 2, 3.0, torch.Generator().manual_seed(0))


def images(cells, title):
    return [to_tensor(cell.image) for cell in cells if cell.title == title]


def test_picture_before_and_after(make, shard, drawn, tmp_path):
    method = make()
    before = expected(method)
    fit(method, tmp_path, 5, callback(tmp_path, shard))
    assert [[cell.title for cell in cells][::PICTURES] for cells in drawn] == [
        ["image", "before"],
        ["image", "before", "after 2 steps"],
        ["image", "before", "after 4 steps"],
        ["image", "before", "after 5 steps"],
    ]
    after = expected(method)
    assert (after - before).abs().max() > 0.02  # five times what a picture on disk may be off
    for name, right in (("before", before), ("after 5 steps", after)):
        torch.testing.assert_close(torch.stack(images(drawn[-1], name)), right, atol=1.1 / 255, rtol=0)
    pictures = torch.stack(images(drawn[-1], "image"))
    torch.testing.assert_close(pictures, batch(PICTURES + 2)["image"][:PICTURES], atol=1.1 / 255, rtol=0)
    with Image.open(tmp_path / "reconstructions.png") as picture:
        assert min(picture.size) > 300


def test_drawing_leaves_training_bit_identical(make, shard, drawn, tmp_path):
    watched, alone = make(), make()
    fit(watched, tmp_path / "watched", 4, callback(tmp_path, shard))
    assert len(drawn) == 3  # the end is the last validation
    fit(alone, tmp_path / "alone", 4)
    start = dict(make().named_parameters())
    for (name, one), other in zip(watched.named_parameters(), alone.parameters(), strict=True):
        assert torch.equal(one, other), name
    assert not torch.equal(watched.condition.projection.weight, start["condition.projection.weight"])


def test_modes_and_random_states_come_back(make, shard, tmp_path):
    method = make().train()
    method.diffusion.eval()
    modes = [module.training for module in method.modules()]
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    trainer = SimpleNamespace(global_step=0, is_global_zero=True, loggers=[])
    callback(tmp_path, shard).on_train_start(trainer, method)
    assert modes == [module.training for module in method.modules()]
    assert states[:2] == (random.getstate(), np.random.get_state()[1].tolist())
    assert torch.equal(states[2], torch.get_rng_state())
    assert torch.is_grad_enabled()
    assert all(p.grad is None for p in method.parameters())


def test_a_resumed_run_still_shows_what_came_before_training(make, shard, drawn, tmp_path):
    fit(make(), tmp_path, 2, callback(tmp_path, shard))
    before = images(drawn[0], "before")
    drawn.clear()
    fit(make(), tmp_path, 4, callback(tmp_path, shard), resume=tmp_path / "last.ckpt")
    assert [cells[-1].title for cells in drawn] == ["after 2 steps", "after 4 steps"]
    torch.testing.assert_close(images(drawn[-1], "before"), before, atol=1.1 / 255, rtol=0)


@pytest.mark.parametrize("why", ["feedback", "shards", "rank"])
def test_nothing_is_drawn_where_there_is_nothing_to_draw(why, make, shard, drawn, tmp_path):
    method = make(feedback=None, caption_weight=1.0) if why == "feedback" else make()
    trainer = SimpleNamespace(global_step=0, is_global_zero=why != "rank", loggers=[])
    silent = callback(tmp_path, None if why == "shards" else shard)
    silent.on_train_start(trainer, method)
    assert not drawn
    assert silent.state_dict() == {"before": None}
    silent.load_state_dict(silent.state_dict())


def test_diva_draws_them_and_other_methods_do_not(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    found = {}
    for method in ("diva", "finetune"):
        monkeypatch.setattr(sys, "argv", ["clipfix", f"method={method}", "--cfg", "job"])
        main()
        found[method] = yaml.safe_load(capsys.readouterr().out)["callbacks"]
    assert found["diva"].keys() - found["finetune"].keys() == {"reconstructions", "watch"}
    written = yaml.safe_load((CONF / "callbacks" / "diva.yaml").read_text())["reconstructions"]
    assert found["diva"]["reconstructions"] == written
    made = instantiate(written | {"folder": str(tmp_path), "shards": "x", "allow_pipe": False})
    assert isinstance(made, Reconstructions)
