"""The output folder of `run=annotate`: which shards are missing. A shard is there completely or not at all.

A small json next to each shard counts its samples. It is written last, so a killed run leaves complete shards with
their counts, and the next run writes the others.
"""

import contextlib
import json
import re
import tarfile
import uuid
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from clipfix.data.shards import expand
from clipfix.system.files import add_sample, put_json

SETTINGS = "annotator.json"  # in the output folder: the settings of all its shards
PLACE = ("output", "batch_size")  # keys of an annotator that do not change its shards
COUNTED = ("samples", "left_out")  # the fates of a sample

Raw = dict[str, Any]  # an undecoded sample: bytes by suffix, and its __key__


class Work(NamedTuple):
    """An output folder and its shards."""

    folder: Path
    shards: dict[str, str]  # name -> source url
    missing: list[str]  # names of those to write


def plan(urls: str | list[str], output: str, settings: dict[str, Any], allow_pipe: bool = False) -> Work:
    """Return what to do. All errors about folders are raised here, before a model is loaded."""
    folder = Path(output).expanduser()
    shards: dict[str, str] = {}
    for url in expand(urls, allow_pipe):
        if not urlsplit(url).scheme and Path(url).resolve().parent == folder.resolve():
            raise ValueError(f"annotator.output={output} is the folder of {url}, which it would replace: name another")
        if (name := name_of(url)) in shards:
            raise ValueError(
                f"{shards[name]} and {url} would both become {folder / name}.tar: annotate them one after the other, "
                "into two folders"
            )
        shards[name] = url
    settings = {key: value for key, value in settings.items() if key not in PLACE}
    claim(folder, settings)
    missing = [name for name, url in shards.items() if not finished(folder, name, url)]
    for name in missing:
        (folder / f"{name}.json").unlink(missing_ok=True)  # a shard is complete when its new counts are there
    return Work(folder, shards, missing)


def name_of(url: str) -> str:
    """Return the name of a shard, without .tar, from its path, its url or the command of a pipe."""
    if not (names := re.findall(r"([^/\s?=]+)\.(?:tar|tgz)\b", url)):
        raise ValueError(f"{url} has no name that ends in .tar, which its annotated copy needs")
    return names[-1]


def claim(folder: Path, settings: dict[str, Any]) -> None:
    """Make the folder, or check that its shards were made with the same settings."""
    path = folder / SETTINGS
    found = json.loads(path.read_text()) if path.exists() else {}
    if found != settings and any(folder.glob("*.tar")):
        differ = [
            f"{key}={found.get(key)}, not {settings.get(key)}"
            for key in sorted({*found, *settings})
            if found.get(key) != settings.get(key)
        ]
        made = f"made with {'; '.join(differ)}" if found else f"without {SETTINGS}"
        raise ValueError(f"{folder} holds shards {made}: choose another annotator.output or delete the folder")
    folder.mkdir(parents=True, exist_ok=True)
    put_json(path, settings)


def finished(folder: Path, name: str, url: str) -> bool:
    """Return whether the shard is complete. A truncated source is read again, because it may have been repaired."""
    report = folder / f"{name}.json"
    if not report.exists() or not (folder / f"{name}.tar").exists():
        return False
    counts = json.loads(report.read_text())
    if not counts["broken"] and None not in (counts["bytes"], size(url)) and counts["bytes"] != size(url):
        raise ValueError(
            f"{folder / name}.tar was made from a shard of {counts['bytes']} bytes, {url} has {size(url)}: "
            f"choose another annotator.output, or delete {name}.tar there if {url} was corrected"
        )
    return not counts["broken"]


def size(url: str) -> int | None:
    """Return the size of a local shard in bytes, which tells apart two shards of one name."""
    return None if urlsplit(url).scheme else Path(url).stat().st_size


class Draft:
    """A shard that is being written; it has another name until it is complete."""

    def __init__(self, folder: Path, name: str, url: str) -> None:
        self.folder, self.name, self.url = folder, name, url
        self.counts = dict.fromkeys(COUNTED, 0)
        self.last: str | None = None  # the key of the sample added last
        self.path = folder / f".{name}.{uuid.uuid4().hex}.part"
        self.tar = tarfile.open(self.path, "x")  # noqa: SIM115  closed when the shard is complete

    def add(self, raw: Raw) -> None:
        """Append one sample."""
        key = raw["__key__"]
        if key == self.last:  # what was between two samples of one key was left out; readers would join the two
            key = f"{key}-{self.counts['samples']}"
        self.last = key
        add_sample(self.tar, key, {name: part for name, part in raw.items() if not name.startswith("__")})
        self.counts["samples"] += 1

    def finish(self, broken: str | None) -> None:
        """Give the shard its name, then write its counts; a shard with only broken samples gets no name."""
        self.tar.close()
        if not broken and self.counts["left_out"] and not self.counts["samples"]:
            broken = f"none of the {self.counts['left_out']} samples of {self.url} can be used"
        if not broken or self.counts["samples"]:
            # Another process may write the same bytes to this folder, and it removes drafts when it has finished.
            with contextlib.suppress(FileNotFoundError):
                self.path.replace(self.folder / f"{self.name}.tar")
        self.path.unlink(missing_ok=True)
        put_json(self.folder / f"{self.name}.json", {**self.counts, "bytes": size(self.url), "broken": broken})

    def discard(self) -> None:
        self.tar.close()
        self.path.unlink(missing_ok=True)
