"""Losses of recipes are those of the code before it was taken apart into objects (commit cc4ee47).

`recipes.json` has what that code gave: losses of four steps in hexadecimal, so no digit is lost. On the machine that
wrote them, all were the same to the last bit. Another CPU adds in another order, so here they are compared to 1e-3.
"""

import json
from pathlib import Path

import lightning as L
import pytest
import torch
from generators import write_generator
from small import batch, build
from torch.utils.data import DataLoader

RECIPES = json.loads((Path(__file__).parent / "recipes.json").read_text())
# One of each method and of each kind of part; the others are variations of their numbers.
FAST = ("diva-default", "diva-lora", "diva-dcr-shuffled", "diva-captions-all", "denoise", "finetune", "longclip",
        "fff-extra", "fff-softmax-extra")  # fmt: skip


class Losses(L.Callback):
    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.values.append(outputs["loss"].item())


@pytest.fixture(scope="module")
def seeded_generator(tmp_path_factory) -> str:
    """The small generator with the weights that `recipes.json` was made with."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        return write_generator(tmp_path_factory.mktemp("generator"))


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in RECIPES]
)
def test_losses_are_those_of_the_code_before(name, clip_folder, seeded_generator):
    recipe, losses = RECIPES[name], Losses()
    method = build(recipe["method"], clip_folder, seeded_generator, *recipe["parts"], **recipe["settings"])
    trainer = L.Trainer(
        max_steps=4, max_epochs=-1, accelerator="cpu", logger=False, callbacks=[losses], enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(method, DataLoader([batch(8, seed) for seed in range(4)], batch_size=None))
    assert losses.values == pytest.approx([float.fromhex(value) for value in recipe["losses"]], rel=1e-3)
