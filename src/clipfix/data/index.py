"""The index of local shards: where each sample lies, so that any of them can be read alone.

It is made from the headers of the tar archives; the content between them is skipped.
"""

import hashlib
import io
import logging
import os
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from webdataset.tariterators import base_plus_ext, group_by_keys

from clipfix.data.shards import StrictMember, content, warn
from clipfix.system.files import atomic_write

log = logging.getLogger(__name__)

BLOCK = tarfile.BLOCKSIZE
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstandard
KEPT_FROM = 100_000  # samples from which an index is kept in a file: smaller ones are read in about a second
THREADS = 8  # shards whose headers are read at the same time; on a slow disk reading is mostly waiting

Bounds = list[tuple[int, int]]  # first byte of each sample, and the byte after it


class UnusualHeader(Exception):
    """A header that `quick_bounds` does not understand, but tarfile may."""


@dataclass(frozen=True)
class Index:
    """The samples of local shards, numbered in stored order.

    Args:
        shards: paths.
        first: number of the first sample of each shard, and the number of all samples [shards + 1].
        starts: first byte of each sample in its shard [samples].
        stops: the byte after it [samples].
    """

    shards: list[str]
    first: np.ndarray
    starts: np.ndarray
    stops: np.ndarray

    @property
    def samples(self) -> int:
        """Number of all samples."""
        return int(self.first[-1])

    def read(self, numbers: Iterable[int], broken: set[str]) -> Iterator[tuple[int, Mapping[str, Any] | Exception]]:
        """Yield (number, undecoded sample or the reason why it cannot be read), in stored order.

        Args:
            numbers: numbers of samples.
            broken: shards that could not be opened before; each is logged once.
        """
        chosen = np.unique(np.fromiter(numbers, np.int64))
        owners = np.searchsorted(self.first, chosen, side="right") - 1
        for owner in np.unique(owners):
            path, mine = self.shards[owner], chosen[owners == owner].tolist()
            try:
                with open(path, "rb", buffering=0) as file:
                    for number in mine:
                        start, stop = int(self.starts[number]), int(self.stops[number])
                        yield number, one_sample(os.pread(file.fileno(), stop - start, start), path)
            except OSError as error:
                if path not in broken:
                    broken.add(path)
                    warn(path, error)
                yield from ((number, error) for number in mine)


def one_sample(data: bytes, url: str) -> Mapping[str, Any] | Exception:
    """Return the undecoded sample of a part of a tar archive, as `shards.read_shard` gives it, or what is wrong."""
    try:
        # Two empty blocks mark the end of an archive.
        with tarfile.open(fileobj=io.BytesIO(data + bytes(2 * BLOCK)), mode="r:", tarinfo=StrictMember) as tar:
            # Of two members with the same name the first is used; `read_shard` names the other one.
            return next(group_by_keys(content(tar, url), handler=lambda _: True))
    except (tarfile.TarError, OSError, StopIteration, ValueError) as error:
        return ValueError(f"{url} has changed since its headers were read ({error!r})")


def index_of(shards: list[str]) -> Index | None:
    """Return the index of shards; None if one is not a plain local file, or is compressed."""
    if any(urlsplit(shard).scheme for shard in shards) or any(map(compressed, shards)):
        return None
    kept = kept_file(shards)
    try:
        with np.load(kept, allow_pickle=False) as saved:
            return Index(shards, saved["first"], saved["starts"], saved["stops"])
    except (OSError, ValueError, KeyError, EOFError):
        pass  # there is none, or it is damaged
    with ThreadPoolExecutor(THREADS) as pool:
        broken: list[str] = []
        found = pool.map(partial(bounds_of, broken=broken), shards)
        parts = [np.array(bounds, np.int64).reshape(-1, 2) for bounds in found]
    joined = np.concatenate([np.empty((0, 2), np.int64), *parts])
    index = Index(shards, np.cumsum([0, *map(len, parts)]), joined[:, 0].copy(), joined[:, 1].copy())
    if index.samples >= KEPT_FROM and not broken:  # a broken shard is named in each run
        try:
            kept.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(kept, may_vanish=True) as draft, draft.open("wb") as file:
                np.savez(file, first=index.first, starts=index.starts, stops=index.stops)
        except OSError as error:
            log.warning("the index of data.train cannot be kept in %s (%s): the next run makes it again", kept, error)
    return index


def kept_file(shards: list[str]) -> Path:
    """Return the file of the index of these shards, whose name depends on their paths, sizes and times of change."""
    known = hashlib.blake2b(digest_size=16)
    for shard in shards:
        try:
            state = os.stat(shard)
        except OSError:  # `bounds_of` names it
            continue
        known.update(f"{Path(shard).absolute()}\n{state.st_size} {state.st_mtime_ns}\n".encode())
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return folder / "clipfix" / "shards" / f"{known.hexdigest()}.npz"


def compressed(shard: str) -> bool:
    try:
        with open(shard, "rb") as file:
            return file.read(8).startswith(COMPRESSED)
    except OSError:
        return False


def bounds_of(shard: str, broken: list[str]) -> Bounds:
    """Return the bounds of each sample of a shard. A broken shard is logged and noted; its readable part counts."""
    try:
        with open(shard, "rb", buffering=0) as file:
            return quick_bounds(file.fileno())
    except (UnusualHeader, OSError):
        return careful_bounds(shard, broken)


def quick_bounds(file: int) -> Bounds:
    """Return the bounds of each sample of an archive whose members are all plain files.

    tarfile takes five times as long.

    Raises:
        UnusualHeader: if it has other members, long names, damage, or no end.
    """
    size, at, start = os.fstat(file).st_size, 0, 0  # `start` is where the headers of a member begin
    samples = Samples()
    while True:
        header = os.pread(file, BLOCK, at)
        if len(header) == BLOCK and not any(header):
            return samples.bounds
        kind, magic, length = header[156:157], header[257:263], header[124:136].strip(b" \0")
        if len(header) < BLOCK or magic not in (b"ustar\0", b"ustar ") or not length.isdigit():
            raise UnusualHeader
        try:
            stop = at + BLOCK + int(length, 8)
        except ValueError:
            raise UnusualHeader from None
        if stop > size:
            raise UnusualHeader
        after = at + BLOCK + (stop - at - 1) // BLOCK * BLOCK
        if kind == b"x":  # further facts about the next member, such as its time
            facts = os.pread(file, stop - at - BLOCK, at + BLOCK)
            if b" path=" in facts or b" size=" in facts:
                raise UnusualHeader
            at = after
            continue
        if kind not in (b"0", b"\0"):
            raise UnusualHeader
        name = header[:100].split(b"\0", 1)[0]
        if magic == b"ustar\0" and header[345]:
            name = header[345:500].split(b"\0", 1)[0] + b"/" + name
        samples.add(name.decode("utf-8", "surrogateescape"), start, after)
        at = start = after


def careful_bounds(shard: str, broken: list[str]) -> Bounds:
    """Return the bounds of each sample by tarfile. Damage is logged, and ends the shard."""
    samples = Samples()
    try:
        with tarfile.open(shard, "r:", tarinfo=StrictMember) as tar:
            size = os.path.getsize(shard)
            for member in tar:
                stop = member.offset_data + member.size
                if stop > size:
                    raise tarfile.ReadError("unexpected end of data")
                if member.isreg():
                    samples.add(member.name, member.offset, -(-stop // BLOCK) * BLOCK)
                tar.members = []  # type: ignore[attr-defined]  # tarfile would keep every header it has seen
    except (OSError, tarfile.TarError) as error:
        broken.append(shard)
        warn(shard, error)
    return samples.bounds


class Samples:
    """Joins members that follow each other and have the same key to samples, as webdataset does."""

    def __init__(self) -> None:
        self.bounds: Bounds = []
        self.key: str | None = None

    def add(self, name: str, start: int, stop: int) -> None:
        key, _ = base_plus_ext(name)
        if key is None:
            return
        if key == self.key:
            start, _ = self.bounds.pop()
        self.bounds.append((start, stop))
        self.key = key
