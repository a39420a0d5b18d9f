"""Urban1k: 1000 street scenes, each with a caption of about 100 words by GPT-4V."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipfix.data.sets import Source, caption_sample


@dataclass(frozen=True)
class Urban1k(Source):
    """`image/<n>.jpg` and `caption/<n>.txt`; the caption is its first line.

    Source: Long-CLIP (arXiv 2403.15378), eval/retrieval/Urban1k.py.
    """

    def needs(self) -> Sequence[Path]:
        return [self.folder / "image", self.folder / "caption"]

    def read(self) -> Iterator[dict[str, Any]]:
        for text in sorted((self.folder / "caption").glob("*.txt")):
            caption = text.read_text(encoding="utf-8").split("\n", 1)[0]
            yield caption_sample(self.folder / "image" / f"{text.stem}.jpg", caption)
