"""Checkpoints of `fit`: written whole or not at all, read without running code, found again to resume."""

import os
import pickle
import uuid
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities.exceptions import SIGTERMException

# -- written -----------------------------------------------------------------------------------------------------------


class WholeFiles(TorchCheckpointIO):
    """A checkpoint takes its name when all of it is on disk: whatever happens before, the one of that name stays.

    Departs from Lightning's own, which writes into the temporary folder and copies from there to another disk.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        path = Path(path)
        draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            for left in path.parent.glob(f".{path.name}.*.part"):  # by a run that was killed as it wrote
                left.unlink(missing_ok=True)
            with draft.open("xb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            draft.replace(path)
        except (OSError, RuntimeError) as error:  # torch's writer turns a full disk into the latter
            draft.unlink(missing_ok=True)
            raise ValueError(
                f"{path} cannot be written ({error}): make room, or write elsewhere by hydra.run.dir=. "
                "What was saved before is whole: resume=auto goes on from there."
            ) from error


class SaveWhenStopped(L.Callback):
    """Saves to `path` when the process is asked to end (SIGTERM), as by SLURM before it gives the node to others.

    Lightning then stops between two batches. Within an accumulated step it is not saved, as its gradient would be
    lost: the run goes on from the checkpoint before.
    """

    def __init__(self, path: str) -> None:
        self.path = path

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        seen: Any = pl_module.batches_seen
        whole = seen % trainer.accumulate_grad_batches == 0
        if isinstance(exception, SIGTERMException) and whole and not trainer.validating:
            trainer.save_checkpoint(self.path)


# -- read --------------------------------------------------------------------------------------------------------------


def read_checkpoint(checkpoint: str) -> dict[str, Any]:
    """A checkpoint of `fit`; its tensors stay on disk until they are asked for."""
    if not Path(checkpoint).is_file():
        raise ValueError(f"checkpoint={checkpoint} is not there: give the checkpoint of a run, outputs/.../best.ckpt.")
    try:
        saved = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError):
        saved = {}
    state = saved.get("state_dict", {})
    if "batches_seen" not in saved and not any(key.startswith("backbone.") for key in state):
        raise ValueError(
            f"checkpoint={checkpoint} is none of clipfix: give the weights of a whole model (DIVA's, Long-CLIP's, "
            "OpenAI's, open_clip's) as backbone.pretrained=/path/to/file, a folder as backbone.name=/path/to/folder."
        )
    return saved


def load_repair(backbone: Any, checkpoint: str) -> dict[str, Any]:
    """The backbone's trained weights from a checkpoint of `fit`, on top of those it was built with; gives the file."""
    from clipfix.backbone import assign

    saved = read_checkpoint(checkpoint)
    state = saved["state_dict"]
    prefix = "backbone."
    weights = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    positions = weights.get("model.text.positional_embedding")
    if positions is not None and positions.shape[1:] == backbone.text.positional_embedding.shape[1:]:
        backbone.set_positions(positions)  # Long-CLIP's table is longer than that of the backbone it came from
    try:
        unexpected = assign(backbone, weights, strict=False)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip()
        raise ValueError(f"{checkpoint} was trained on another backbone: {first}") from error
    if unexpected:
        raise ValueError(f"{checkpoint} was trained on another backbone: {unexpected[0]} is not in this one.")
    return saved


def checkpoint_to_resume(resume: str | None, folder: Path) -> str | None:
    """`auto` means the newest checkpoint that can be read of this run folder, which `run_folder` chose to continue."""
    if resume != "auto":
        if resume is not None:
            read_checkpoint(resume)  # what is none is named before anything is scored
        return resume
    found = folder.glob("checkpoints/*.ckpt")
    for path in sorted(found, key=lambda path: (path.name == "last.ckpt", path.stat().st_mtime), reverse=True):
        try:
            read_checkpoint(str(path))
        except ValueError:
            print(f"{path} is cut off or no checkpoint of fit: passed over.")
        else:
            print(f"Resuming {path}")
            return str(path)
    print(f"Nothing to resume: {folder} starts from the beginning.")
    return None
