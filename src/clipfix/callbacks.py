"""What a run tells about itself while it trains, beside its losses, and the folder that a pretraining ends in."""

import resource
import time
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import RichProgressBar

from clipfix.backbone import Backbone


class Progress(RichProgressBar):
    """Lightning's bar, worded for runs that steps end: they have no epochs to count and no version number."""

    def _get_train_description(self, current_epoch: int) -> str:
        return "Training"

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return metrics


class Throughput(L.Callback):
    """Logs `perf/images_per_second` over all ranks, `perf/memory_gb` (peak) and `data/skipped` (broken samples so far).

    The clock runs from one training batch to the next, waiting for data included, and stands still in validation.
    """

    def __init__(self) -> None:
        self.images = self.skipped = 0
        self.started = 0.0

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """After whatever other callbacks do before training."""
        self.restart()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.restart()

    def restart(self) -> None:
        self.images, self.started = 0, time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.images += len(batch["image"])
        self.skipped += batch["skipped"]
        if (batch_idx + 1) % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            seconds = time.perf_counter() - self.started
            pl_module.log("perf/images_per_second", trainer.world_size * self.images / seconds)
            pl_module.log("perf/memory_gb", peak_memory_gb())
            pl_module.log("data/skipped", float(self.skipped), sync_dist=True, reduce_fx="sum")
            self.restart()


class SaveFolder(L.Callback):
    """Writes the backbone as an open_clip folder when training ends: `backbone.name=<folder>` loads it."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module.backbone, Backbone)
        if trainer.is_global_zero:
            pl_module.backbone.save(self.folder)


def peak_memory_gb() -> float:
    """The most this process has held: on the GPU where there is one, else in main memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
