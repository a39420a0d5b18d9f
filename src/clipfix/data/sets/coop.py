"""Labelled sets with the splits of CoOp, which Tip-Adapter and APE use as well: one json per set."""

from pathlib import Path
from typing import Any

from clipfix.data.labelled import SPLITS, Contents, Labelled, LabelledSet, Split, distinct, read_json, spaced


class CoOp(LabelledSet):
    """`split_zhou_<Name>.json`: {"train": [[path, label, class name], ...], "val": ..., "test": ...}.

    Labels start at 0. Source: CoOp (arXiv 2109.01134), DATASETS.md and `OxfordPets.read_split`.

    Args:
        split_file: the json, in the folder of the set.
        pictures: the folder that paths begin in, relative to that of the set.
        settings: those of `LabelledSet`.
    """

    def __init__(self, *, split_file: str, pictures: str, **settings: Any) -> None:
        super().__init__(**settings)
        self.split_file, self.pictures = Path(split_file), Path(pictures)

    def read(self) -> Contents:
        file = self.existing(self.home / self.split_file)
        folder = self.existing(self.home / self.pictures)
        content = read_json(file)
        names: dict[int, str] = {}
        splits: dict[Split, list[Labelled]] = {}
        for split in SPLITS:
            if not isinstance(content, dict) or not isinstance(content.get(split), list):
                raise ValueError(f"{file} has no list {split!r}: it must be one of CoOp's split_zhou_*.json files.")
            splits[split] = []
            for row in content[split]:
                match row:
                    case [str(path), int(label), str(name)] if label >= 0:
                        pass
                    case _:
                        raise ValueError(f"{file}: {row!r} in {split!r} must be [path, label from 0, class name].")
                if names.setdefault(label, spaced(name)) != spaced(name):
                    raise ValueError(f"{file}: label {label} is {names[label]!r} and {spaced(name)!r}: it must be one.")
                splits[split].append(Labelled(path, folder / path, label))
        if gaps := [label for label in range(max(names, default=-1)) if label not in names]:
            raise ValueError(
                f"{file}: labels go up to {max(names)}, but no picture has label {gaps[0]}: close the gap."
            )
        self.with_pictures([item for items in splits.values() for item in items], file)
        return Contents(distinct([names[label] for label in sorted(names)], file), splits, [file])
