"""Classification sets in a local folder: CIFAR, ObjectNet, and clip_benchmark's WebDataset layout.

Departs from clip_benchmark, whose decoders unpickle members of a shard by their suffix and whose builders run shell
commands with the name of the folder: shards are read by `data.shards`, and only pictures and labels are decoded.
"""

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from clipfix.data.sets import Labelled, inside

# Of CIFAR, torchvision checks the hash before it unpickles; ObjectNet is json and pictures.
FOLDERS = ("cifar10", "cifar100", "objectnet")
WEBDATASET = "wds/"


@dataclass(frozen=True)
class Named(Labelled):
    """The test split of one set. Nothing is downloaded.

    Args:
        name: clip_benchmark's name: `cifar10`, `cifar100`, `objectnet`, or `wds/<name>` for a folder in its
            WebDataset layout, with classes and templates.
        present: A file or folder inside `root` that exists if the set is there.

    Raises:
        ValueError: The name is none of these.
    """

    packages = ("clip_benchmark",)

    name: str
    present: str

    def __post_init__(self) -> None:
        if not (self.name in FOLDERS or self.name.startswith(WEBDATASET)):
            raise ValueError(f"name is {self.name!r}: choose from {', '.join(FOLDERS)}, {WEBDATASET}<name>")

    def needs(self) -> Sequence[Path]:
        return [self.folder / self.present]

    def files(self) -> list[str]:
        (told,) = self.needs()
        return [str(file.resolve()) for file in inside(told if told.is_dir() else told.parent)]

    def read(self) -> Iterator[dict[str, Any]]:
        for number, (image, label) in enumerate(self._rows()):
            yield {"key": f"{self.name}/{number}", "image": image, "txt": "", "json": {"label": label}}

    def classes(self) -> list[str]:
        return self._lines("classnames.txt") if self._in_shards else list(self._dataset.classes)

    def templates(self) -> list[str]:
        name = "zeroshot_classification_templates.txt"
        return self._lines(name) if self._in_shards else list(self._dataset.templates)

    @property
    def _in_shards(self) -> bool:
        return self.name.startswith(WEBDATASET)

    def _rows(self) -> Iterator[tuple[Any, Any]]:
        """Yield each picture with its label; several labels are for each class 1 or 0."""
        if not self._in_shards:
            yield from map(self._dataset.__getitem__, range(len(self._dataset)))
            return
        from clipfix.data.decoding import decode
        from clipfix.data.shards import read_shard

        split = self.folder / "test"
        for number in range(int((split / "nshards.txt").read_text())):
            for raw in read_shard(str(split / f"{number}.tar"), on_error=incomplete):
                try:
                    yield decode({"__key__": raw["__key__"], **pictures(raw)})["image"], label_of(raw)
                except Exception as error:  # a broken picture raises errors of many types
                    raise ValueError(f"{raw['__key__']} in {raw['__url__']} is broken: {error}") from error

    def _lines(self, name: str) -> list[str]:
        return [line.strip() for line in (self.folder / name).read_text(encoding="utf-8").splitlines()]

    @cached_property
    def _dataset(self) -> Any:
        from clip_benchmark.datasets.builder import build_dataset

        if not self.folder.is_dir():  # the builder would download ObjectNet by shell commands with this name
            raise ValueError(f"{self.folder} is not a folder")
        return build_dataset(self.name, str(self.folder), split="test", download=False)


def incomplete(url: str, error: Exception) -> None:
    """Raise an error for a broken shard, because the score of a part does not compare with published ones."""
    raise ValueError(f"{url} is broken: {error}")


def pictures(raw: Mapping[str, Any]) -> dict[str, bytes]:
    """Return the members of a sample that are pictures."""
    from clipfix.data.decoding import IMAGES

    return {suffix: raw[suffix] for suffix in IMAGES if suffix in raw}


def label_of(raw: Mapping[str, Any]) -> int | list[int]:
    """Return the number of the class from `cls`, or from `npy` 1 or 0 for each class. Nothing is unpickled."""
    if "cls" in raw:
        return int(raw["cls"])
    return np.load(io.BytesIO(raw["npy"]), allow_pickle=False).astype(np.int64).tolist()
