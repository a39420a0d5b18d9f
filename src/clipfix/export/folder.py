"""Files of an export into a folder that is there whole or not at all."""

import contextlib
import glob
import json
import os
import shutil
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor

PROVENANCE = "provenance.json"  # the mark of a folder that an export wrote, and may replace
LARGEST_FILE = 5_000_000_000  # bytes; what the hub and transformers cut at
ABANDONED = 3600  # seconds; one file of 5 GB takes a fraction of that even on a slow disk


@dataclass(frozen=True)
class Weights:
    """Tensors for one safetensors file, or for several where its reader knows how to join them."""

    state: Mapping[str, Tensor]
    in_parts: bool = False


Content = bytes | str | dict[str, Any] | list[Any] | Weights  # dictionaries and lists are json
Files = dict[str, Content]  # by path inside the folder


def check_free(folder: Path, overwrite: bool) -> None:
    """Refuses a folder that holds anything but an export that may be replaced."""
    if not folder.exists():
        return
    if not (folder / PROVENANCE).is_file():
        raise ValueError(f"{folder} is there and no export wrote it: give another export.output.")
    if not overwrite:
        raise ValueError(f"{folder} is there already: set export.overwrite=true to replace it, or export.output.")


def write(files: Files, folder: Path, dtype: torch.dtype, overwrite: bool = False) -> None:
    """All of the files under a hidden name beside `folder`, on disk, and only then under its own.

    A process that is killed leaves at most that hidden folder, which a later export to this place clears away; one
    that fails or is interrupted not even that.
    """
    check_free(folder, overwrite)
    clear_drafts(folder)
    mark = uuid.uuid4().hex[:8]
    draft, old = (folder.with_name(f".{folder.name}.{mark}.{state}") for state in ("part", "old"))
    try:
        draft.mkdir(parents=True)
        for name, content in files.items():
            (draft / name).parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, Weights):
                write_weights(draft / name, content, dtype)
            else:
                put(draft / name, content)
        for path in [*draft.rglob("*"), draft]:
            flush(path)
        if folder.exists():
            folder.rename(old)
        draft.rename(folder)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        if old.exists():
            old.rename(folder)
        raise
    flush(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def clear_drafts(folder: Path) -> None:
    """Removes what killed exports to this place left: drafts that nobody has written to for `ABANDONED` seconds.

    By age and not by process id, as who writes may be another machine on a shared disk. A folder that is being replaced
    (`.old`) stays: of a process killed between its two renames it is the only copy.
    """
    for draft in folder.parent.glob(f".{glob.escape(folder.name)}.{'[0-9a-f]' * 8}.part"):
        with contextlib.suppress(FileNotFoundError):  # done in this moment
            if time.time() - max(path.stat().st_mtime for path in [draft, *draft.rglob("*")]) > ABANDONED:
                shutil.rmtree(draft, ignore_errors=True)


def write_weights(path: Path, weights: Weights, dtype: torch.dtype, largest: int = LARGEST_FILE) -> None:
    """One file, or parts of at most `largest` bytes with the index that transformers reads."""
    pattern = f"{path.stem}{{suffix}}.safetensors"
    state = dict(weights.state)
    if not weights.in_parts:
        largest = sum(tensor.nbytes for tensor in state.values()) + 1
    parts = split_torch_state_dict_into_shards(state, filename_pattern=pattern, max_shard_size=largest)
    for name, keys in parts.filename_to_tensors.items():
        # One part after the other is converted, and what has the right type is written from where it lies.
        part = {key: state[key].detach().to("cpu", dtype).contiguous() for key in keys}
        save_file(part, path.with_name(name), metadata={"format": "pt"})
        path.with_name(name).chmod(0o644)  # safetensors writes for its owner alone, but folders are shared and shipped
    if parts.is_sharded:
        index = {"metadata": parts.metadata, "weight_map": parts.tensor_to_filename}
        put(path.with_name(f"{path.name}.index.json"), index)


def put(path: Path, content: bytes | str | dict[str, Any] | list[Any]) -> None:
    if isinstance(content, dict | list):
        content = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def flush(path: Path) -> None:
    """Waits until a file's or folder's content is on disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
