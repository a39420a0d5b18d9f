"""COCO captions: val2017 and Karpathy's 5000 of val2014 are different pictures, so they are different benchmarks."""

import contextlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from clipfix.data.sets import Annotated, caption_sample


@dataclass(frozen=True)
class COCO(Annotated):
    """A folder of pictures and an annotation file in COCO's format; all captions of a picture, five to seven."""

    packages = ("pycocotools",)

    def read(self) -> Iterator[dict[str, Any]]:
        from torchvision.datasets import CocoCaptions

        pictures = self.folder / self.pictures
        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
            coco = CocoCaptions(str(pictures), str(self.folder / self.annotations)).coco
        for number in sorted(coco.imgs):
            captions = [annotation["caption"] for annotation in coco.imgToAnns[number]]
            yield caption_sample(pictures / coco.imgs[number]["file_name"], *captions)
