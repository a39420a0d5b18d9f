"""Classification sets that clip_benchmark reads from a local folder: torchvision's formats, and WebDataset."""

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
        name: clip_benchmark's name; `wds/<name>` is a folder in its WebDataset layout, with classes and templates.
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
        rows = iter(self._dataset) if self.name.startswith("wds/") else map(self._dataset.__getitem__, self._numbers())
        for number, (image, label) in enumerate(rows):
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
