"""Winoground: two pictures and two captions of the same words in another order."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipfix.data.sets import Source


@dataclass(frozen=True)
class Winoground(Source):
    """`examples.jsonl` and `images/<name>.png`, as in the authors' zip; a sample is one picture of two.

    Source: Thrush et al. 2022 (arXiv 2204.03162). clip_benchmark's reader needs the model hub.
    """

    def needs(self) -> Sequence[Path]:
        return [self.folder / "examples.jsonl", self.folder / "images"]

    def read(self) -> Iterator[dict[str, Any]]:
        with (self.folder / "examples.jsonl").open(encoding="utf-8") as file:
            for example in map(json.loads, file):
                for side in (0, 1):
                    name, caption = example[f"image_{side}"], example[f"caption_{side}"]
                    record = {"pair": example["id"], "pattern": example["collapsed_tag"], "statement": caption}
                    picture = self.folder / "images" / f"{name}.png"
                    yield {"key": name, "image": picture, "txt": caption, "json": record}
