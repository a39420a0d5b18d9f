"""Samples into shards, and small files whole or not at all; the standard library alone, as drawing needs no torch."""

import contextlib
import io
import json
import tarfile
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def add_sample(tar: tarfile.TarFile, key: str, members: Mapping[str, bytes]) -> None:
    """One sample by suffix. These entries carry no time and no user, so the same samples are the same bytes."""
    for suffix, content in members.items():
        member = tarfile.TarInfo(f"{key}.{suffix}")
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))


def put_json(path: Path, content: Any) -> None:
    """Writes a json file, whole or not at all."""
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    draft.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
    # Whoever else fills this folder writes the same, and sweeps up drafts once all is there.
    with contextlib.suppress(FileNotFoundError):
        draft.replace(path)
