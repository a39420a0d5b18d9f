"""ImageNet, V2, A, R and Sketch: folders by class, named by WordNet id or, in V2, by number."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from clipfix.data.sets import Labelled


@dataclass(frozen=True)
class ImageNet(Labelled):
    """One folder per class. Only classes with a folder are used: 200 of 1000 in A and R.

    Class names and templates are clip_benchmark's, which are open_clip's and OpenAI's.
    """

    packages = ("clip_benchmark",)

    def needs(self) -> Sequence[Path]:
        return [self.folder]

    def read(self) -> Iterator[dict[str, Any]]:
        from torchvision.datasets import ImageFolder

        found = ImageFolder(str(self.folder))
        numbers = [self._number(name) for name in found.classes]
        place = {number: i for i, number in enumerate(sorted(numbers))}
        for path, folder in found.samples:
            picture = Path(path)
            label = place[numbers[folder]]
            yield {
                "key": f"{picture.parent.name}/{picture.stem}",
                "image": picture,
                "txt": "",
                "json": {"label": label},
            }

    def classes(self) -> list[str]:
        names = packaged("en_classnames.json")["imagenet1k"]
        return [
            names[number]
            for number in sorted(self._number(path.name) for path in self.folder.iterdir() if path.is_dir())
        ]

    def templates(self) -> list[str]:
        return packaged("en_zeroshot_classification_templates.json")["imagenet1k"]

    def _number(self, folder: str) -> int:
        from clip_benchmark.datasets.builder import all_imagenet_wordnet_ids

        return int(folder) if folder.isdecimal() else all_imagenet_wordnet_ids.index(folder)


def packaged(name: str) -> dict[str, list[str]]:
    """Return a table that is part of clip_benchmark."""
    return json.loads((files("clip_benchmark.datasets") / name).read_text(encoding="utf-8"))
