"""Export of a model to folders that other libraries load. Each target is one file here.

A target is a function that returns the files of its folder for a backbone. It raises an error for a model that it does
not support. All targets are called before anything is written.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from clipfix.export import card, comfyui, diffusers, llava, open_clip, sentence_transformers, timm, transformers
from clipfix.export.folder import check_free, write
from clipfix.models.clip import Backbone

TARGETS = {
    "open_clip": open_clip.files,
    "transformers": transformers.files,
    "llava": llava.files,
    "diffusers": diffusers.files,
    "diffusers_2": diffusers.second_files,
    "sentence_transformers": sentence_transformers.files,
    "timm": timm.files,
    "comfyui": comfyui.files,
}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def check(to: Sequence[str], output: Path, dtype: str, overwrite: bool, push_to: str | None) -> None:
    """Check the settings, before a model is loaded."""
    if unknown := [target for target in to if target not in TARGETS]:
        raise ValueError(f"export.to={unknown[0]} does not exist: choose from {', '.join(TARGETS)}.")
    if not to:
        raise ValueError(f"export.to is empty: choose from {', '.join(TARGETS)}.")
    if dtype not in DTYPES:
        raise ValueError(f"export.dtype={dtype} does not exist: choose from {', '.join(DTYPES)}.")
    if not isinstance(overwrite, bool):
        raise ValueError(f"export.overwrite={overwrite} is neither true nor false.")
    there = next(folder for folder in (output, *output.absolute().parents) if folder.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)):
        raise ValueError(
            f"export.output={output} cannot be written because of {there}: give a folder as export.output."
        )
    for target in to:
        check_free(output / target, overwrite)
    if push_to is not None:
        if len(to) > 1:
            raise ValueError(f"export.push_to is one repository, but export.to has {len(to)} targets: name one.")
        check_login()


def export(
    backbone: Backbone,
    to: Sequence[str],
    output: Path,
    dtype: str,
    overwrite: bool,
    push_to: str | None,
    about: Mapping[str, Any],
) -> list[Path]:
    """Write each target to `output/<target>` and return these folders. `about` is for the model card.

    `check` must have accepted the settings.
    """
    planned = {target: TARGETS[target](backbone) for target in to}
    for target, files in planned.items():
        described = card.files(backbone, target, {**about, "dtype": dtype})
        write(files | described, output / target, DTYPES[dtype], overwrite)
    if push_to is not None:
        push(output / to[0], push_to)
    return [output / target for target in to]


def check_login() -> None:
    """Check the login at the hub, before any work."""
    import huggingface_hub

    try:
        huggingface_hub.whoami()
    except Exception as error:  # no token, a wrong one or no network: the error class depends on the release
        raise ValueError(
            f"export.push_to needs a login at the hub ({str(error).splitlines()[0]}): run `hf auth login`, or set "
            "HF_TOKEN to a token that may write."
        ) from error


def push(folder: Path, repository: str) -> None:
    import huggingface_hub

    huggingface_hub.create_repo(repository, exist_ok=True)
    huggingface_hub.upload_folder(repo_id=repository, folder_path=folder, commit_message="Export by clipfix")
