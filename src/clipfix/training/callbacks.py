"""Callbacks: progress bar, throughput, steps that are not finite, and saving a folder at the end of training."""

import resource
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ProgressBar
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.table import Column
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from clipfix.models.clip import Backbone
from clipfix.training.strategy import FSDP2


class Progress(ProgressBar):
    """Shows the progress of training on one line: batches, elapsed and remaining time, and metrics logged for the bar.

    Departs from Lightning's RichProgressBar. A run is ended by `method.steps`, so the bar counts the batches of the
    whole run instead of those of an epoch. The line is cut off at the width of the terminal instead of wrapping.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bar = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=10),
            TextColumn("{task.completed}/{task.total}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[metrics]}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)),
            expand=True,
        )
        self.task = self.bar.add_task("Training", start=False, metrics="")

    def disable(self) -> None:
        """Show nothing; Lightning calls this on all ranks except the first."""
        self.bar.disable = True

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        total = trainer.max_steps * trainer.accumulate_grad_batches if trainer.max_steps > 0 else None
        self.bar.reset(self.task, total=total)
        self.bar.start()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.bar.update(self.task, completed=batch_idx + 1, metrics=metrics_text(trainer.progress_bar_metrics))

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.bar.update(self.task, description="Validation")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.bar.update(self.task, description="Training", metrics=metrics_text(trainer.progress_bar_metrics))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.stop()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self.stop()

    def stop(self) -> None:
        """Leave the last state of the bar on the screen."""
        if self.bar.live.is_started:
            self.bar.stop()


def metrics_text(metrics: Mapping[str, Any]) -> str:
    """Return metrics as one short line: `train/loss` becomes `loss`, `selection/pairs/mean` becomes `pairs/mean`."""
    short = {name.removeprefix("train/").removeprefix("selection/"): value for name, value in metrics.items()}
    return " ".join(f"{name} {float(value):.3g}" for name, value in short.items())


class Throughput(L.Callback):
    """Logs `perf/images_per_second` over all ranks, `perf/memory_gb` (peak) and `data/skipped` (broken samples so far).

    The measured time includes waiting for data, and excludes validation.
    """

    def __init__(self) -> None:
        self.images = self.skipped = 0
        self.started = 0.0

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock after the `on_train_start` of other callbacks."""
        self.restart()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.restart()

    def restart(self) -> None:
        self.images, self.started = 0, time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.images += len(batch["image"])
        self.skipped += batch.get("skipped", 0)
        if (batch_idx + 1) % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            seconds = time.perf_counter() - self.started
            pl_module.log("perf/images_per_second", trainer.world_size * self.images / seconds)
            pl_module.log("perf/memory_gb", peak_memory_gb())
            pl_module.log("data/skipped", float(self.skipped), sync_dist=True, reduce_fx="sum")
            self.restart()


class Finite(L.Callback):
    """Skips steps whose gradients are NaN or infinite, and stops the run after `patience` of them in a row.

    The gradients are checked when they are complete: a bad sample in one micro-batch or on one rank has reached them
    on all ranks by then. A skipped step changes no weight and no moment of the optimizer; the schedule advances.
    `perf/skipped_steps` counts them. When the run stops, each rank saves its last batch, or the batch of a loss that
    was not finite, as `nonfinite-<rank>.pt`.

    Args:
        folder: folder for the saved batches.
        patience: consecutive skipped steps that stop the run.

    Raises:
        ValueError: after `patience` skipped steps in a row.
    """

    def __init__(self, folder: str, patience: int) -> None:
        if patience < 1:
            raise ValueError(f"callbacks.finite.patience is {patience}: set 1 or more, or callbacks.finite=null.")
        self.folder, self.patience = Path(folder), patience
        self.skipped = self.in_a_row = 0
        self.batch: Any = None
        self.spoiled = False

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if not self.spoiled:
            self.batch = batch

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: torch.Tensor) -> None:
        self.spoiled = self.spoiled or not loss.isfinite()

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        weights = [weight for group in optimizer.param_groups for weight in group["params"] if weight.grad is not None]
        norm = torch.nn.utils.get_total_norm([weight.grad for weight in weights])
        if isinstance(norm, DTensor):  # sharded: each rank has the norm of its shard
            norm = norm.full_tensor()
        if norm.isfinite():
            self.in_a_row = 0
        else:
            self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
            for weight in weights:  # optimizers leave a weight without a gradient unchanged
                weight.grad = None
            if self.in_a_row >= self.patience:
                self.stop(trainer)
        pl_module.log("perf/skipped_steps", float(self.skipped))
        self.batch, self.spoiled = None, False

    def stop(self, trainer: L.Trainer) -> None:
        path = self.folder / f"nonfinite-{trainer.global_rank}.pt"
        torch.save(self.batch, path)
        raise ValueError(
            f"The loss or its gradients were NaN or infinite in {self.in_a_row} steps in a row, the last at step "
            f"{trainer.global_step}; its batch is {path}. Lower method.optimizer.lr, set trainer.gradient_clip_val=1 "
            "or trainer.precision=32-true, and continue from the newest checkpoint by resume=auto."
        )

    def state_dict(self) -> dict[str, int]:
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.skipped, self.in_a_row = state_dict["skipped"], state_dict["in_a_row"]


class SaveFolder(L.Callback):
    """Writes the backbone as an open_clip folder when training ends: `backbone.name=<folder>` loads it."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if isinstance(trainer.strategy, FSDP2):
            raise ValueError("callbacks.save_folder cannot write sharded weights: choose trainer=ddp or gpu.")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module.backbone, Backbone)
        if trainer.is_global_zero:
            pl_module.backbone.save(self.folder)


class SaveTensors(L.Callback):
    """Writes a part of the method to a .safetensors file when training ends.

    Args:
        prefix: the tensors whose names in a checkpoint begin with it are written.
        path: the file. An existing file is replaced.
    """

    def __init__(self, prefix: str, path: str) -> None:
        self.prefix, self.path = prefix, path

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        state = pl_module.state_dict()
        tensors = {name: tensor.cpu().contiguous() for name, tensor in state.items() if name.startswith(self.prefix)}
        if trainer.is_global_zero:
            Path(self.path).parent.mkdir(parents=True, exist_ok=True)
            save_file(tensors, self.path)


def peak_memory_gb() -> float:
    """Return the peak memory of this process in GB: on the GPU if there is one, otherwise in main memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
