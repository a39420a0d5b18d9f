"""Checkpoints of `fit`: atomic writing, saving on signals, reading without running code, and resuming."""

import os
import pickle
import signal
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from clipfix.models.base import Model
from clipfix.system.files import atomic_write

# -- written -----------------------------------------------------------------------------------------------------------


class WholeFiles(TorchCheckpointIO):
    """Writes checkpoints atomically: an interrupted save leaves the earlier checkpoint of that name.

    Departs from Lightning's TorchCheckpointIO, which may write to the temporary folder and copy the file from there.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        path = Path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            for draft in path.parent.glob(f".{path.name}.*.part"):  # left by a run that was killed while saving
                draft.unlink(missing_ok=True)
            with atomic_write(path) as draft, draft.open("xb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
        except (OSError, RuntimeError) as error:  # torch raises a RuntimeError for a full disk
            raise ValueError(
                f"{path} cannot be written ({error}): make room, or set hydra.run.dir to another disk. The earlier "
                "checkpoint is intact, and resume=auto continues from it."
            ) from error


class SaveWhenStopped(Checkpoint):
    """Saves to `path` and stops training between two optimizer steps when a rank receives SIGTERM or SIGUSR1.

    SLURM and torchrun send SIGTERM some time before they kill a process; SIGUSR1 is common in SLURM's --signal.

    The ranks agree after each batch whether any of them received a signal. They then finish an accumulated step and a
    validation that is due, save, and raise SIGTERMException where the next batch would begin.

    Replaces Lightning's handlers. Lightning's SIGUSR1 handler saves in the middle of a step, and its SIGTERM handler
    starts a collective operation at whatever point the process has reached. `trainer.should_stop` would add a
    validation at this step, and the run would end as if it were complete.

    This is a `Checkpoint`, which Lightning calls after all other callbacks: WiSE has restored the trained weights by
    then. Pass it after ModelCheckpoint, whose newest score belongs into the file.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.signalled = self.stopping = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Replace the handlers that Lightning has just installed; it restores the earlier ones after training."""

        def handle(number: Any, frame: Any) -> None:
            self.signalled = True
            if trainer.strategy.launcher is not None:  # this process started the other ranks
                trainer.strategy.launcher.kill(number)

        self.signalled = self.stopping = False
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, handle)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        seen: Any = pl_module.batches_seen
        step_done = seen % trainer.accumulate_grad_batches == 0
        self.stopping = step_done and trainer.strategy.reduce_boolean_decision(self.signalled, all=False)
        self.save_if_stopping(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.save_if_stopping(trainer)  # again, with the scores of this validation

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.raise_if_stopping()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.raise_if_stopping()

    def save_if_stopping(self, trainer: L.Trainer) -> None:
        if self.stopping:
            trainer.save_checkpoint(self.path)

    def raise_if_stopping(self) -> None:
        if self.stopping:
            raise SIGTERMException


# -- read --------------------------------------------------------------------------------------------------------------


def read_checkpoint(checkpoint: str, key: str = "checkpoint") -> dict[str, Any]:
    """Return a checkpoint of `fit`. Its tensors are memory-mapped.

    Args:
        checkpoint: path of the file.
        key: config key of the path, for error messages.

    Raises:
        ValueError: if the file is missing, damaged, or no checkpoint of `fit`.
    """
    if not isinstance(checkpoint, str) or not Path(checkpoint).is_file():
        raise ValueError(
            f"{key}={checkpoint} does not exist: set it to the checkpoint of a run, outputs/.../best.ckpt."
        )
    try:
        saved = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError):
        saved = {}
    state = saved.get("state_dict", {})
    if "batches_seen" not in saved and not any(name.startswith(("backbone.", "model.")) for name in state):
        raise ValueError(
            f"{key}={checkpoint} is not a checkpoint of clipfix: set backbone.pretrained=/path/to/file for the weights "
            "of a complete model (DIVA's, Long-CLIP's, OpenAI's, open_clip's), backbone.name=/path/to/folder for a "
            "folder."
        )
    return saved


def load_repair(model: Model, checkpoint: str) -> dict[str, Any]:
    """Load the trained weights of a checkpoint of `fit` into a model with pretrained weights; return the checkpoint.

    Raises:
        ValueError: if it was trained on another backbone, or cannot be read.
    """
    saved = read_checkpoint(checkpoint)
    try:
        model.load_trained(saved["state_dict"])
    except ValueError as error:
        raise ValueError(f"{checkpoint} was trained on another backbone: {error}") from error
    return saved


def checkpoint_to_resume(resume: str | None, folder: Path) -> str | None:
    """Return the checkpoint to resume from, or None.

    Args:
        resume: `auto` for the newest readable checkpoint of the run folder, a path, or None.
        folder: run folder. With `auto`, the resolver `run_folder` has chosen the run to continue.

    Raises:
        ValueError: if a given path is no checkpoint.
    """
    if resume != "auto":
        if resume is not None:
            read_checkpoint(resume, "resume")  # raises before anything is scored
        return resume
    paths = folder.glob("checkpoints/*.ckpt")
    for path in sorted(paths, key=lambda path: (path.name == "last.ckpt", path.stat().st_mtime), reverse=True):
        try:
            read_checkpoint(str(path))
        except ValueError:
            print(f"{path} is damaged or no checkpoint of fit: skipped.")
        else:
            print(f"Resuming {path}")
            return str(path)
    print(f"Nothing to resume: {folder} starts from the beginning.")
    return None


class SameBuckets(L.Callback):
    """Makes DDP build its gradient buckets before the first step, in new runs and in resumed ones.

    DDP reduces the gradients of its first backward pass in one piece, and later ones in buckets. With three ranks or
    more the order of summation depends on the position in the piece, so the first step of a resumed run would be
    rounded differently from the same step of an uninterrupted run. This callback runs one pass with zero gradients
    first.
    """

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        ranks = trainer.strategy.model
        if not isinstance(ranks, DistributedDataParallel):
            return

        def nothing(_: None) -> Tensor:
            trained = [weight for weight in pl_module.parameters() if weight.requires_grad]
            return torch.stack([0 * weight.sum() for weight in trained]).sum()

        pl_module.forward = nothing  # type: ignore[method-assign]
        try:
            ranks(None).backward()
        finally:
            del pl_module.forward
        pl_module.zero_grad()
