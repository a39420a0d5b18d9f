"""Writing of samples into shards, and atomic writing of files. Uses the standard library alone."""

import contextlib
import io
import json
import tarfile
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


def add_sample(tar: tarfile.TarFile, key: str, members: Mapping[str, bytes]) -> None:
    """Add one sample, given as bytes by suffix. Entries have no time and no user, so equal samples give equal bytes."""
    for suffix, content in members.items():
        member = tarfile.TarInfo(f"{key}.{suffix}")
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))


@contextlib.contextmanager
def atomic_write(path: Path, may_vanish: bool = False) -> Iterator[Path]:
    """Yield the path of a draft beside `path`; rename it to `path` at the end of the block, or delete it on an error.

    Args:
        may_vanish: whether a missing draft is no error. Other processes may write the same file, and delete drafts when
            they have finished.
    """
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        yield draft
        with contextlib.suppress(FileNotFoundError) if may_vanish else contextlib.nullcontext():
            draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def put_json(path: Path, content: Any) -> None:
    """Write a json file atomically."""
    with atomic_write(path, may_vanish=True) as draft:
        draft.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
