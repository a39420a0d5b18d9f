"""ShareGPT4V-1k: the first records of ShareGPT4V's json, all of them pictures of SAM with long captions."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from clipfix.data.sets import Source, caption_sample
from clipfix.data.sharegpt4v import parse


@dataclass(frozen=True)
class ShareGPT4V(Source):
    """The first `records` of `json_name`; each has the path of its picture relative to the folder.

    Source: Long-CLIP (arXiv 2403.15378), train/sharegpt4v.py: the long caption, with blanks in place of line ends.
    """

    json_name: str
    records: int

    def needs(self) -> Sequence[Path]:
        return [self.folder / self.json_name, self.folder / "sam"]

    def read(self) -> Iterator[dict[str, Any]]:
        path = self.folder / self.json_name
        for number, found in enumerate(islice(entries(path), self.records)):
            record = parse(number, found, path)
            yield caption_sample(self.folder / record.image, record.caption)


def entries(path: Path) -> Iterator[Any]:
    """Yield the entries of a json list one by one: all of ShareGPT4V's json would take 4 GB of memory."""
    decoder, rest = json.JSONDecoder(), ""
    with path.open(encoding="utf-8") as file:
        rest = file.read(1 << 20).lstrip().removeprefix("[")
        while True:
            rest = rest.lstrip(" \n\r\t,")
            try:
                entry, end = decoder.raw_decode(rest)
            except json.JSONDecodeError:
                if not (more := file.read(1 << 20)):
                    if rest.startswith("]"):
                        return
                    raise
                rest += more
                continue
            yield entry
            rest = rest[end:]
