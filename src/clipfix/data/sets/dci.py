"""DCI, Densely Captioned Images: pictures of SAM that annotators described part by part."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipfix.data.sets import Source, caption_sample


@dataclass(frozen=True)
class DCI(Source):
    """`splits.json` (split -> files), `annotations/<file>` and `photos/<image>`; the caption is short plus extra.

    Source: Urbanek et al. 2023 (arXiv 2312.08578), `get_extended_caption`; LoTLIP (arXiv 2410.05249) uses it for
    retrieval over all splits. Departs: LoTLIP also joins the sentences again by ". ".
    """

    splits: Sequence[str]

    def __post_init__(self) -> None:
        object.__setattr__(self, "splits", tuple(self.splits))  # yaml has lists, which cannot be hashed

    def needs(self) -> Sequence[Path]:
        return [self.folder / "splits.json", self.folder / "annotations", self.folder / "photos"]

    def read(self) -> Iterator[dict[str, Any]]:
        files = json.loads((self.folder / "splits.json").read_text(encoding="utf-8"))
        for name in (name for split in self.splits for name in files[split]):
            record = json.loads((self.folder / "annotations" / name).read_text(encoding="utf-8"))
            caption = f"{record['short_caption']}\n{record['extra_caption']}"
            yield caption_sample(self.folder / "photos" / record["image"], caption)
