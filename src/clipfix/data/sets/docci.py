"""DOCCI: photographs taken for the purpose, each with a description of about 136 words."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipfix.data.sets import Source, caption_sample


@dataclass(frozen=True)
class DOCCI(Source):
    """`docci_descriptions.jsonlines` (`split`, `image_file`, `description`) and `images/`.

    Source: Onoe et al. 2024 (arXiv 2404.19753).
    """

    split: str

    def needs(self) -> Sequence[Path]:
        return [self.folder / "docci_descriptions.jsonlines", self.folder / "images"]

    def read(self) -> Iterator[dict[str, Any]]:
        with (self.folder / "docci_descriptions.jsonlines").open(encoding="utf-8") as file:
            for record in map(json.loads, file):
                if record["split"] == self.split:
                    yield caption_sample(self.folder / "images" / record["image_file"], record["description"])
