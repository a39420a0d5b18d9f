"""Labelled pictures in WebDataset shards."""

import io
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from clipfix.data.labelled import Contents, Labelled, LabelledSet, Split, distinct, read_names

NAMES = ("class_name", "classname", "label_name")  # json keys that may hold the name of a class


class LabelledShards(LabelledSet):
    """Samples of a picture and `<key>.cls`, a number from 0, or a json with `label`.

    The files of all pictures are kept in memory, not decoded: this is for sets that fit there.

    Args:
        train, val, test: paths, globs, folders or urls of shards, as `shards.expand` reads them. `val: null` carves it
            out of train.
        names: names of the classes in the order of the labels: a list, or a file with one a line. None takes them from
            the samples: `<key>.cls.txt`, or `class_name` of the json.
        settings: those of `LabelledSet`; `root` is the folder that relative paths begin in.
    """

    def __init__(
        self,
        *,
        train: str | list[str],
        test: str | list[str],
        val: str | list[str] | None = None,
        names: str | Sequence[str] | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        given: dict[Split, Any] = {"train": train, "val": val, "test": test}
        self.urls = {split: [urls] if isinstance(urls, str) else list(urls) for split, urls in given.items() if urls}
        self.names = names if names is None or isinstance(names, str) else list(names)

    def read(self) -> Contents:
        names: dict[int, str] = {}
        splits: dict[Split, list[Labelled]] = {}
        files: list[Path | str] = []
        for split, urls in self.urls.items():
            splits[split] = []
            for number, shard in enumerate(self._shards(split, urls)):
                if shard in files:
                    raise ValueError(f"{shard} is read twice: name other shards in data.set.{split}.")
                files.append(shard)
                for raw in read_whole(shard):
                    place = f"{raw['__key__']} in {shard}"
                    label, name = label_of(raw, place)
                    if name is not None and names.setdefault(label, name) != name:
                        raise ValueError(f"{place} gives label {label} the name {name!r}, not {names[label]!r}.")
                    # The number, because shards of two folders often have one name: train/00000.tar, test/00000.tar.
                    key = f"{split}-{number:05d}/{raw['__key__']}"
                    splits[split].append(Labelled(key, encoded_picture(raw, place), label))
        return Contents(self._names(names, splits), splits, files)

    def _shards(self, split: str, urls: list[str]) -> list[str]:
        from clipfix.data.shards import expand

        placed = [url if "://" in url else str(self.home / Path(url).expanduser()) for url in urls]
        try:
            return expand(placed)
        except ValueError as error:
            raise ValueError(str(error).replace("data.train or data.selection", f"data.set.{split}")) from None

    def _names(self, found: Mapping[int, str], splits: Mapping[Split, list[Labelled]]) -> list[str]:
        labels = {item.label for items in splits.values() for item in items}
        top = max(labels, default=-1)
        if self.names is not None:
            return read_names(self.names)
        if nameless := [label for label in range(top + 1) if label not in found]:
            if nameless[0] not in labels:
                raise ValueError(f"{self.home}: labels go up to {top}, but no picture has label {nameless[0]}.")
            raise ValueError(
                f"{self.home}: label {nameless[0]} has no name: set data.set.names to a file with one name a line, or "
                f"add <key>.cls.txt to the samples."
            )
        return distinct([found[label] for label in range(top + 1)], self.home)


def read_whole(shard: str) -> Iterator[dict[str, Any]]:
    """Yield the undecoded samples of a shard; a damaged one raises ValueError, because labels would be missing."""
    from clipfix.data.shards import read_shard

    def refuse(url: str, error: Exception) -> None:
        raise ValueError(f"{url} is broken ({error}): fetch it again.")

    yield from read_shard(shard, refuse)


def label_of(raw: Mapping[str, Any], place: str) -> tuple[int, str | None]:
    """Return the label of an undecoded sample, and the name of its class if the sample has it."""
    try:
        record = json.loads(raw.get("json", b"{}"))
        label = int(raw["cls"]) if "cls" in raw else record["label"]
        name = (
            raw["cls.txt"].decode().strip()
            if "cls.txt" in raw
            else next((record[k] for k in NAMES if k in record), None)
        )
    except (LookupError, TypeError, ValueError, AttributeError):
        label, name = None, None
    if not isinstance(label, int) or isinstance(label, bool) or label < 0:
        raise ValueError(f"{place} has no label: it needs <key>.cls, a number from 0, or a json with such a label.")
    return label, name


def encoded_picture(raw: Mapping[str, Any], place: str) -> bytes:
    """Return the image file of an undecoded sample; ValueError if it has none, or one whose header cannot be read."""
    from clipfix.data.decoding import FORMATS, encoded_image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            Image.open(io.BytesIO(encoded_image(raw)), formats=FORMATS)
    except Exception as error:
        raise ValueError(f"{place} cannot be read as a picture ({error}): write the shard again without it.") from error
    return encoded_image(raw)
