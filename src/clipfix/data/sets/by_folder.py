"""Labelled pictures in one folder per class, with or without folders for the splits."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from clipfix.data.labelled import Contents, Labelled, LabelledSet, Split, carve, distinct, read_names, spaced

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")
TEST_SHARE = 0.3  # of pictures without splits. Source: CoOp (arXiv 2109.01134), `read_and_split_data`


class Folders(LabelledSet):
    """`<root>/{train,val,test}/<class>/*.jpg`, or `<root>/<class>/*.jpg`.

    Without folders for the splits, 30 % of each class is test, by `seed`. Without `val`, it is carved out of train.
    Classes are the folders of train in alphabetical order.

    Args:
        train, val, test: folders of the splits. `val: null` never reads one.
        names: names of the classes in the order of their folders: a list, or a file with one a line. None takes the
            names of the folders, with blanks for `_`.
        settings: those of `LabelledSet`.
    """

    def __init__(
        self,
        *,
        train: str = "train",
        val: str | None = "val",
        test: str = "test",
        names: str | Sequence[str] | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        self.train, self.val, self.test = Path(train), None if val is None else Path(val), Path(test)
        self.names = names if names is None or isinstance(names, str) else list(names)

    def read(self) -> Contents:
        folders: dict[Split, Path] = {"train": self.home / self.train, "test": self.home / self.test}
        if self.val is not None and (self.home / self.val).is_dir():
            folders["val"] = self.home / self.val
        found = [path for path in folders.values() if path.is_dir()]
        whole = not found
        if whole:
            folders = {"train": self.home}
        for name, path in folders.items():
            if not path.is_dir():
                raise ValueError(
                    f"{self.home} has {found[0].relative_to(self.home)}/, but no {path.relative_to(self.home)}/ for "
                    f"the {name} split: add it, or set data.set.{name} to its name. {self.fetch}".rstrip()
                )
        classes = [path.name for path in subfolders(folders["train"])]
        if not classes:
            raise ValueError(f"{folders['train']} has no folder: put the pictures of each class into one of its own.")
        splits = {name: list(self._items(path, classes)) for name, path in folders.items()}
        if whole:
            splits["train"], splits["test"] = carve(splits["train"], TEST_SHARE, self.seed)
        return Contents(self._names(classes, folders["train"]), splits)

    def _items(self, split: Path, classes: Sequence[str]) -> Iterator[Labelled]:
        labels = {name: label for label, name in enumerate(classes)}
        for folder in subfolders(split):
            if folder.name not in labels:
                raise ValueError(f"{folder} is no class of train: add pictures of it there, or remove it.")
            pictures = sorted(entry.name for entry in os.scandir(folder) if entry.name.lower().endswith(SUFFIXES))
            if not pictures:
                raise ValueError(f"{folder} has no picture ({', '.join(SUFFIXES)}): add some, or delete the folder.")
            place = folder.relative_to(self.home).as_posix()
            for name in pictures:
                yield Labelled(f"{place}/{name}", folder / name, labels[folder.name])

    def _names(self, folders: list[str], place: Path) -> list[str]:
        if self.names is None:
            return distinct([spaced(name) for name in folders], place)
        names = read_names(self.names)
        if len(names) != len(folders):
            raise ValueError(
                f"data.set.names has {len(names)} names, but {place} has {len(folders)} folders: one name belongs to "
                "each, in alphabetical order of the folders."
            )
        return names


def subfolders(path: Path) -> list[Path]:
    """Return the folders in a folder in alphabetical order, without hidden ones."""
    return sorted(Path(entry.path) for entry in os.scandir(path) if entry.is_dir() and not entry.name.startswith("."))
