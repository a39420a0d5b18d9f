"""Reads the records that an offline W&B run wrote to disk, which `wandb sync` would send."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

HEADER = b":W&B\xe1\xbe\x00"
BLOCK = 32 * 1024
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


@dataclass
class Stored:
    """The content of a `.wandb` file: `config` and `summary` by key, and a dict for each logged row in `history`."""

    group: str
    config: dict[str, Any]
    history: list[dict[str, Any]]
    summary: dict[str, Any]
    files: Path

    def scalars(self, name: str) -> dict[int, float]:
        """Return the values of a metric by optimizer step; the last one if a step has several."""
        return {row["trainer/global_step"]: row[name] for row in self.history if name in row}

    def media(self, name: str) -> list[Path]:
        """Return the files of a picture or a table in its last row."""
        last = [row[name] for row in self.history if name in row][-1]
        return [self.files / path for path in last.get("filenames") or [last["path"]]]

    def names(self) -> set[str]:
        """Return the names of all logged values, without the counters of Lightning and W&B."""
        counted = {"epoch", "trainer/global_step"}
        return {name for row in self.history for name in row if name[0] != "_" and name not in counted}

    def at(self, key: str) -> Any:
        """Return the value of a nested key of the config, as in `method.optimizer.lr`."""
        return reduce(getitem, key.split("."), self.config)


def stored(folder: Path) -> Stored:
    """Return the only W&B run in a run folder."""
    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    run = Stored("", {}, [], {}, path.parent / "files")
    for record in records(path.read_bytes()):
        match record.WhichOneof("record_type"):
            case "run":
                run.group = record.run.run_group
                run.config |= values(record.run.config.update)
            case "config":
                run.config |= values(record.config.update)
            case "history":
                run.history.append(values(record.history.item))
            case "summary":
                run.summary |= values(record.summary.update)
    return run


def values(items: Any) -> dict[str, Any]:
    """Return items of a record as nested dicts."""
    nested: dict[str, Any] = {}
    for item in items:
        *path, last = item.nested_key or [item.key]
        inner = nested
        for key in path:
            inner = inner.setdefault(key, {})
        inner[last] = json.loads(item.value_json)
    return nested


def records(data: bytes) -> Iterator[Record]:
    """Yield the records of a file in the log format of LevelDB.

    It has blocks of chunks with a header of 7 bytes (checksum, length, position in the record).

    Source: https://github.com/google/leveldb/blob/main/doc/log_format.md; wandb puts 7 bytes of its own in front.
    """
    assert data.startswith(HEADER)
    at, parts = len(HEADER), b""
    while at + 7 <= len(data):
        if BLOCK - at % BLOCK < 7:  # a header never crosses a block; the rest of the block is empty
            at += BLOCK - at % BLOCK
            continue
        length, place = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        parts = (parts if place in (MIDDLE, LAST) else b"") + data[at + 7 : at + 7 + length]
        if place in (FULL, LAST):
            yield Record.FromString(parts)
        at += 7 + length
