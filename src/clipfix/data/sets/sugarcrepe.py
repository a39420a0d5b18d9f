"""SugarCrepe: pictures of COCO val2017, each with its caption and one into which a language model put a mistake."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipfix.data.sets import Source


@dataclass(frozen=True)
class SugarCrepe(Source):
    """`<subset>.json` in the folder (`filename`, `caption`, `negative_caption`), and COCO's pictures elsewhere.

    Source: Hsieh et al. 2023 (arXiv 2306.14610).
    """

    packages = ("clip_benchmark",)

    pictures: str
    subsets: Sequence[str]

    def __post_init__(self) -> None:
        object.__setattr__(self, "subsets", tuple(self.subsets))  # yaml has lists, which cannot be hashed

    def needs(self) -> Sequence[Path]:
        return [Path(self.pictures).expanduser(), *(self.folder / f"{subset}.json" for subset in self.subsets)]

    def read(self) -> Iterator[dict[str, Any]]:
        from clip_benchmark.datasets.sugar_crepe import SugarCrepe as Subset

        pictures, *annotations = self.needs()
        for subset, path in zip(self.subsets, annotations, strict=True):
            for found in Subset(str(pictures), str(path)).ann.values():
                picture = pictures / found["filename"]
                record = {"subset": subset, "caption": found["caption"], "foil": found["negative_caption"]}
                yield {"key": picture.stem, "image": picture, "txt": record["caption"], "json": record}
