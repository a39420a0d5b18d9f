"""A run of a few seconds by the command, and a signal sent to it at a chosen moment."""

import os
import sys
from pathlib import Path

import lightning as L
import torch

from clipfix.__main__ import main

STEPS = 6
WORLD = {"train": 64, "selection": 16, "test": 16, "pairs_train": 1, "pairs_selection": 2, "pairs_test": 2}
RUN = [
    "method=finetune", "logger=csv", "trainer=cpu", "eval=none", "trainer.val_check_interval=2",
    "report.pictures=false", f"method.steps={STEPS}", "method.schedule.warmup_steps=1",
    "data.batch_size=8", "data.workers=0", "data.shuffle=16", "data.prepare.processes=1",
    *(f"data.prepare.{name}={size}" for name, size in WORLD.items()),
]  # fmt: skip


class Signal(L.Callback):
    """Sends a signal to its own process in the n-th call of a hook, where n is `batch`."""

    def __init__(self, number: int, hook: str, batch: int) -> None:
        self.number, self.batch, self.batches = number, batch, 0
        setattr(self, hook, self.strike)

    def strike(self, *_: object) -> None:
        self.batches += 1
        if self.batches == self.batch:
            os.kill(os.getpid(), self.number)


def send(number: int, hook: str, batch: int) -> str:
    return f"+callbacks.signal={{_target_: small_runs.Signal, number: {int(number)}, hook: {hook}, batch: {batch}}}"


def command(*words: str) -> None:
    sys.argv = ["clipfix", *RUN, *words]
    os.environ.pop("HYDRA_FULL_ERROR", None)
    main()


def weights(folder: Path) -> dict[str, torch.Tensor]:
    saved = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == STEPS
    return saved["training"]
