"""Published data sets as their authors hand them out, in a local folder: one file each, bound from conf/eval.

A source yields what shards yield ({key, image, txt, json}), so that a benchmark never knows which of them it reads.
What is not there is named before anything is loaded: nothing imports torch until samples are read.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Source(ABC):
    """One split of one data set. Equal sources are read once, and so is a picture file that several of them name.

    `fetch` says what to download, how large it is and where to put it. `samples` is how many the published split has:
    a score over fewer pictures would be another benchmark's. null = any number.
    """

    packages: ClassVar[Sequence[str]] = ()  # of the extra `eval`, where the set is read by them

    root: str
    fetch: str
    samples: int | None

    @abstractmethod
    def needs(self) -> Sequence[Path]:
        """Files and folders without which there is nothing to read."""

    @abstractmethod
    def read(self) -> Iterator[dict[str, Any]]:
        """The samples in a fixed order; `image` is a PIL picture, or the path of its file, and `key` names it."""

    def files(self) -> list[str]:
        """All files that its samples lie in, in a fixed order: a result tells by their hash what was scored."""
        return [str(file.resolve()) for path in self.needs() for file in inside(path)]

    @property
    def folder(self) -> Path:
        return Path(self.root).expanduser()

    def missing(self) -> str | None:
        """One line that says what is not there and how to get it; None where all is there."""
        if uninstalled := [package for package in self.packages if find_spec(package) is None]:
            return f"it is read by {uninstalled[0]}, which is not installed: pip install 'clipfix[eval]'"
        absent = next((path for path in self.needs() if not path.exists()), None)
        return None if absent is None else f"there is no {absent}. {self.fetch}"

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if line := self.missing():
            raise ValueError(line)
        count = 0
        try:
            for sample in self.read():
                count += 1
                yield sample
        except (
            OSError,
            EOFError,
            LookupError,
            RuntimeError,
            TypeError,
            ValueError,
        ) as error:  # cut off, or another layout
            raise ValueError(f"{self.folder} cannot be read ({error!r}): fetch it again. {self.fetch}") from error
        if self.samples not in (None, count):
            raise ValueError(
                f"{self.folder} has {count} of {self.samples} samples, so its score would compare with nobody's: fetch "
                f"it again, or set its samples to null. {self.fetch}"
            )


@dataclass(frozen=True)
class Labelled(Source):
    """A source whose json holds `label`, a number into `classes()`, or for each of them 1 or 0."""

    @abstractmethod
    def classes(self) -> Sequence[str]:
        """The classes by name."""

    @abstractmethod
    def templates(self) -> Sequence[str]:
        """The prompts of this data set; `{c}` is the class. Source: clip_benchmark, for all of them."""


@dataclass(frozen=True)
class Annotated(Source):
    """A folder of pictures, and one file of what is said of them."""

    pictures: str
    annotations: str

    def needs(self) -> Sequence[Path]:
        return [self.folder / self.pictures, self.folder / self.annotations]


def present(benchmarks: Mapping[str, T], sources: Mapping[str, Source]) -> dict[str, T]:
    """The benchmarks whose data is there, by the sources of those that read a published set.

    Of each other one, a line says what to fetch; none at all is an error.
    """
    missing = {name: line for name, source in sources.items() if (line := source.missing())}
    told = [f"{name}: {line}" for name, line in missing.items()]
    if missing and len(missing) == len(benchmarks):
        others = f" {len(told) - 1} more are not there either: data/README.md has them all." if len(told) > 1 else ""
        raise ValueError(f"There is no data to score in eval.root. {told[0]}{others}")
    for line in told:
        print(f"Skipped {line}")
    return {name: benchmark for name, benchmark in benchmarks.items() if name not in missing}


def inside(path: Path) -> list[Path]:
    """The file, or every file of a folder, at any depth."""
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]


def caption_sample(picture: Path, *captions: str) -> dict[str, Any]:
    """A picture with its captions, of which the first is also its txt."""
    return {"key": picture.stem, "image": picture, "txt": captions[0], "json": {"captions": list(captions)}}
