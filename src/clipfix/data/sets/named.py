"""Classification sets in clip_benchmark's layouts: those that it reads by torchvision, and WebDataset."""

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from clipfix.data.sets import Labelled, inside


@dataclass(frozen=True)
class Named(Labelled):
    """The test split of one set. Nothing is downloaded.

    Args:
        name: clip_benchmark's name.
        present: A file or folder inside `root` that exists if the set is there.
    """

    packages = ("clip_benchmark",)

    name: str
    present: str

    def needs(self) -> Sequence[Path]:
        return [self.folder / self.present]

    def files(self) -> list[str]:
        (told,) = self.needs()
        return [str(file.resolve()) for file in inside(told if told.is_dir() else told.parent)]

    def read(self) -> Iterator[dict[str, Any]]:
        for number in self._numbers():
            image, label = self._dataset[number]
            label = np.asarray(label).tolist()  # several labels: for each class 1 or 0
            yield {"key": f"{self.name}/{number}", "image": image, "txt": "", "json": {"label": label}}

    def classes(self) -> list[str]:
        return list(self._dataset.classes)

    def templates(self) -> list[str]:
        return list(self._dataset.templates)

    def _numbers(self) -> range:
        return range(len(self._dataset))

    @cached_property
    def _dataset(self) -> Any:
        from clip_benchmark.datasets.builder import build_dataset

        return build_dataset(self.name, str(self.folder), split="test", download=False)


@dataclass(frozen=True)
class Shards(Labelled):
    """The test split of a set in clip_benchmark's WebDataset layout, as on the model hub.

    `test/nshards.txt` and `test/<number>.tar` with `webp`, `png`, `jpg` or `jpeg` beside `cls` (a number) or `npy` (1
    or 0 for each class), `classnames.txt` and `zeroshot_classification_templates.txt`. Other members are not read:
    webdataset's own decoders would unpickle some of them.

    Args:
        name: clip_benchmark's name, for the keys of the samples.
    """

    name: str

    def needs(self) -> Sequence[Path]:
        return [self.folder / "test" / "nshards.txt"]

    def files(self) -> list[str]:
        return [str(file.resolve()) for file in inside(self.folder / "test")]

    def read(self) -> Iterator[dict[str, Any]]:
        from PIL import Image

        from clipfix.data.shards import read_shard

        def fail(url: str, error: Exception) -> None:
            raise ValueError(f"{url}: {error}")

        number = 0
        for shard in range(int((self.folder / "test" / "nshards.txt").read_text())):
            for raw in read_shard(str(self.folder / "test" / f"{shard}.tar"), on_error=fail):
                image = next((raw[kind] for kind in ("webp", "png", "jpg", "jpeg") if kind in raw), None)
                if image is None or not ("cls" in raw or "npy" in raw):
                    raise ValueError(f"{shard}.tar has no picture or no label for {raw['__key__']}")
                label = (
                    int(raw["cls"]) if "cls" in raw else np.load(io.BytesIO(raw["npy"]), allow_pickle=False).tolist()
                )
                yield {
                    "key": f"{self.name}/{number}", "image": Image.open(io.BytesIO(image)), "txt": "",
                    "json": {"label": label},
                }  # fmt: skip
                number += 1

    def classes(self) -> list[str]:
        return self._lines("classnames.txt")

    def templates(self) -> list[str]:
        return self._lines("zeroshot_classification_templates.txt")

    def _lines(self, name: str) -> list[str]:
        return [line.strip() for line in (self.folder / name).read_text().splitlines()]
