"""Samples into shards, and small files whole or not at all; the standard library alone, as drawing needs no torch."""

import contextlib
import io
import json
import tarfile
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


def add_sample(tar: tarfile.TarFile, key: str, members: Mapping[str, bytes]) -> None:
    """One sample by suffix. These entries carry no time and no user, so the same samples are the same bytes."""
    for suffix, content in members.items():
        member = tarfile.TarInfo(f"{key}.{suffix}")
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))


@contextlib.contextmanager
def whole(path: Path, swept: bool = False) -> Iterator[Path]:
    """A name beside `path` to write to; the file takes its own when the block ends well, and is gone when it does not.

    `swept`: others fill this folder with the same bytes and sweep up drafts when all is there, so it may be gone.
    """
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        yield draft
        with contextlib.suppress(FileNotFoundError) if swept else contextlib.nullcontext():
            draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def put_json(path: Path, content: Any) -> None:
    """Writes a json file, whole or not at all."""
    with whole(path, swept=True) as draft:
        draft.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
