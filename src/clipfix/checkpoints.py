"""Checkpoints of `fit`: read without running code, laid over a backbone, found again to resume."""

from pathlib import Path
from typing import Any


def read_checkpoint(checkpoint: str) -> dict[str, Any]:
    """A checkpoint of `fit`; its tensors stay on disk until they are asked for."""
    import pickle

    import torch

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
    saved = read_checkpoint(checkpoint)
    state = saved["state_dict"]
    prefix = "backbone."
    weights = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    positions = weights.get("model.text.positional_embedding")
    if positions is not None and positions.shape[1:] == backbone.text.positional_embedding.shape[1:]:
        backbone.set_positions(positions)  # Long-CLIP's table is longer than that of the backbone it came from
    try:
        unexpected = backbone.load_state_dict(weights, strict=False).unexpected_keys
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip()
        raise ValueError(f"{checkpoint} was trained on another backbone: {first}") from error
    if unexpected:
        raise ValueError(f"{checkpoint} was trained on another backbone: {unexpected[0]} is not in this one.")
    return saved


def checkpoint_to_resume(resume: str | None, folder: Path) -> str | None:
    """`auto` means the newest checkpoint of this run folder, which `run_folder` chose to continue."""
    if resume != "auto":
        if resume is not None:
            read_checkpoint(resume)  # what is none is named before anything is scored
        return resume
    newest = folder / "checkpoints" / "last.ckpt"
    print(f"Resuming {newest}" if newest.exists() else "Nothing to resume: a new run starts.")
    return str(newest) if newest.exists() else None
