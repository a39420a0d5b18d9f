"""Writing the files of an export: a folder is there completely or not at all."""

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

PROVENANCE = "provenance.json"  # marks a folder that an export wrote and may replace
LARGEST_FILE = 5_000_000_000  # bytes; where the hub and transformers split files
ABANDONED = 3600  # seconds; one file of 5 GB takes a fraction of that even on a slow disk


@dataclass(frozen=True)
class Weights:
    """Tensors for one safetensors file, or for several if the reader supports that."""

    state: Mapping[str, Tensor]
    in_parts: bool = False


Content = bytes | str | dict[str, Any] | list[Any] | Weights  # dicts and lists are written as json
Files = dict[str, Content]  # path inside the folder -> content


def check_free(folder: Path, overwrite: bool) -> None:
    """Raise ValueError for a folder with other content than an export that may be replaced."""
    if not folder.exists():
        return
    if not (folder / PROVENANCE).is_file():
        raise ValueError(f"{folder} exists and no export wrote it: give another export.output.")
    if not overwrite:
        raise ValueError(f"{folder} exists: set export.overwrite=true to replace it, or give another export.output.")


def write(files: Files, folder: Path, dtype: torch.dtype, overwrite: bool = False) -> None:
    """Write all files to a hidden folder beside `folder`, flush them to disk, then rename it.

    A killed process leaves at most that hidden folder, which a later export to the same place removes. A process that
    fails or is interrupted leaves nothing.
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
    """Remove drafts of killed exports to this place: those not written to for `ABANDONED` seconds.

    The age decides, not the process id, because another machine may write to a shared disk. A folder that is being
    replaced (`.old`) is kept: if the process was killed between its two renames, it is the only copy.
    """
    for draft in folder.parent.glob(f".{glob.escape(folder.name)}.{'[0-9a-f]' * 8}.part"):
        with contextlib.suppress(FileNotFoundError):  # renamed in this moment
            if time.time() - max(path.stat().st_mtime for path in [draft, *draft.rglob("*")]) > ABANDONED:
                shutil.rmtree(draft, ignore_errors=True)


def write_weights(path: Path, weights: Weights, dtype: torch.dtype, largest: int = LARGEST_FILE) -> None:
    """Write one file, or parts of at most `largest` bytes with the index that transformers reads."""
    pattern = f"{path.stem}{{suffix}}.safetensors"
    state = dict(weights.state)
    if not weights.in_parts:
        largest = sum(tensor.nbytes for tensor in state.values()) + 1
    parts = split_torch_state_dict_into_shards(state, filename_pattern=pattern, max_shard_size=largest)
    for name, keys in parts.filename_to_tensors.items():
        # Convert one part after the other; tensors of the right type are written without a copy.
        part = {key: state[key].detach().to("cpu", dtype).contiguous() for key in keys}
        save_file(part, path.with_name(name), metadata={"format": "pt"})
        path.with_name(name).chmod(0o644)  # safetensors gives permissions to the owner alone, but exports are shared
    if parts.is_sharded:
        index = {"metadata": parts.metadata, "weight_map": parts.tensor_to_filename}
        put(path.with_name(f"{path.name}.index.json"), index)


def put(path: Path, content: bytes | str | dict[str, Any] | list[Any]) -> None:
    if isinstance(content, dict | list):
        content = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def flush(path: Path) -> None:
    """Wait until the content of a file or folder is on disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
