"""MMVP-VLM: 135 pairs of photographs with similar CLIP features, in nine visual patterns."""

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipfix.data.sets import Source

# Names in Questions.csv and of the folders -> names in the paper, which the drawn world and the radar plot use.
# Source: scripts/evaluate_vlm.py, which names each run of 15 pairs, but three of the patterns by other words; the names
# in the file as public code that reads it has them.
PATTERNS = {
    "Orientation": "Orientation and Direction",
    "Presence": "Presence of Specific Features",
    "State": "State and Condition",
    "Quantity": "Quantity and Count",
    "Spatial": "Positional and Relational Context",
    "Color": "Color and Appearance",
    "Structural Character": "Structural and Physical Characteristics",
    "Text": "Text",
    "Camera Perspective": "Viewpoint and Perspective",
}
SPELLINGS = ("MLLM_VLM Images", "MLLM_VLM_Images", "MMVP_VLM_Images")  # MMVP's and DIVA's scripts, MMVP's read-me


@dataclass(frozen=True)
class MMVP(Source):
    """`Questions.csv` (`Question ID,Type,Statement`) and `<pictures>/<Type>/<Question ID>.jpg`.

    Two consecutive rows are a pair; each statement belongs to its own picture. Folder names may have `_` for blanks.
    Source: Tong et al. 2024 (arXiv 2401.06209), scripts/evaluate_vlm.py.
    """

    def needs(self) -> Sequence[Path]:
        return [self.folder / "Questions.csv", self._pictures()]

    def read(self) -> Iterator[dict[str, Any]]:
        with (self.folder / "Questions.csv").open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file))
        for place, row in enumerate(rows):
            kind, number = row["Type"].strip(), row["Question ID"].strip()
            folder = self._pictures() / kind
            picture = (folder if folder.is_dir() else folder.with_name(kind.replace(" ", "_"))) / f"{number}.jpg"
            record = {"pair": place // 2, "pattern": PATTERNS.get(kind, kind), "statement": row["Statement"].strip()}
            yield {"key": number, "image": picture, "txt": record["statement"], "json": record}

    def _pictures(self) -> Path:
        found = [self.folder / name for name in SPELLINGS if (self.folder / name).is_dir()]
        return found[0] if found else self.folder / SPELLINGS[0]
