"""Mistakes, and what goes wrong in a run: one clear message each."""

from pathlib import Path

import pytest
import torch
from front_door import DATA, DIVA, QUICK, RUN, WORLD, refusal


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["seeed=1"], ["no seeed", "Did you mean seed?", "backbone"]),
        (["method.step=1"], ["no method.step", "method.steps"]),
        (["method=divaa"], ["method/divaa", "diva", "finetune"]),
        (["run=train"], ["run=train", "fit, eval"]),
        (["backbone=vit-l14"], ["data.train, eval.shards"]),
        (["backbone=vit-b32", "data.train=nowhere/*.tar", "eval=none"], ["backbone.pretrained=/path/to/file"]),
        (["backbone.pretrained=nowhere.pt"], ["nowhere.pt"]),
        (["method=longclip", "data=shards", "data.train=nowhere", "eval=none"], ["reads data.texts.long", "key: long"]),
        (["method=finetune", "method.train=[vision]"], ["visual, text, logit_scale"]),
        (
            ["method=fff", "method.mining.reference=null"],
            ["method.mining.reference is null", "data.features=features.npz"],
        ),
        (["method=finetune", "data=shards", "data.train=nowhere/*.tar", "eval=none"], ["nowhere"]),
        (["run=eval", "backbone=folder", "eval=none"], ["backbone.name=..."]),
    ],
)
def test_mistakes_get_one_clear_error(arguments, words, clipfix, capsys):
    message = refusal(clipfix, *arguments)
    assert "Error executing job" not in capsys.readouterr().err  # hydra's way
    assert all(word in message for word in words), message
    assert not list(Path.cwd().glob("outputs/*/*")), "a run that never started left a folder"


@pytest.mark.parametrize(
    ("method", "error", "words"),
    [
        ("finetune", torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), ["2.00 GiB"]),
        ("longclip", RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: ..."), ["method.chunk=64"]),
        (
            "fff",
            RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed."),
            ["lower method.objective.tile (256)"],
        ),
        ("diva", MemoryError(), ["backbone.checkpointing=true", "diffusion.checkpointing=true"]),
    ],
)
def test_out_of_memory_says_what_to_lower(method, error, words, clipfix, scenes, monkeypatch):
    def full(*_, **__):
        raise error

    monkeypatch.setattr("lightning.Trainer.fit", full)
    message = refusal(clipfix, *(DIVA if method == "diva" else [f"method={method}"]), scenes, *QUICK, "eval=none")
    assert all(word in message for word in ["Out of memory (", "lower data.batch_size (8)", *words]), message
    assert "diffusion" not in message or method == "diva"


def test_a_run_that_diverges_stops_and_leaves_its_batch(clipfix, scenes):
    settings = ["eval=none", "method.steps=9", "method.optimizer.lr=1e30", "callbacks.finite.patience=2"]
    message = refusal(clipfix, "method=finetune", scenes, *RUN, *DATA, *WORLD, *settings)
    assert "NaN or infinite in 2 steps in a row" in message
    assert "Lower method.optimizer.lr" in message
    (kept,) = Path.cwd().glob("outputs/*/*/nonfinite-0.pt")
    batch = torch.load(kept, weights_only=True)
    assert len(batch["key"]) == len(batch["image"]) == 8
