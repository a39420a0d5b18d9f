"""Flickr30k: Karpathy's test split of 1000 pictures, and all 31,783, which score some 30 points lower."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from clipfix.data.sets import Annotated, caption_sample


@dataclass(frozen=True)
class Flickr30k(Annotated):
    """A folder of pictures, and their captions in one of two formats.

    A `.token` file is the authors', with all captions; another name is read as clip_benchmark's csv of a split.
    """

    packages = ("clip_benchmark",)

    def read(self) -> Iterator[dict[str, Any]]:
        pictures, annotations = (str(path) for path in self.needs())
        if self.annotations.endswith(".token"):
            from torchvision.datasets import Flickr30k as AllOfFlickr30k

            captions = AllOfFlickr30k(pictures, annotations).annotations.items()
        else:
            from clip_benchmark.datasets.flickr import Flickr

            captions = Flickr(pictures, annotations).data
        for name, texts in captions:
            yield caption_sample(self.folder / self.pictures / name, *texts)
