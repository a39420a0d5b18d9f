"""Published data sets in a local folder, in the form in which their authors publish them: one file each.

A source yields the same samples as shards ({key, image, txt, json}), so benchmarks read both in the same way. Missing
data is reported before anything is loaded: nothing imports torch until samples are read.
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
    """One split of one data set. Equal sources are read once, and so is a picture file that several of them use.

    Args:
        root: Folder of the data set.
        fetch: What to download, its size, and where to put it; part of error messages.
        samples: Size of the published split. Another number of samples is an error, because the score could not be
            compared with published ones. None accepts any number.
    """

    packages: ClassVar[Sequence[str]] = ()  # that read the set; all are in the extra `eval`

    root: str
    fetch: str
    samples: int | None

    @abstractmethod
    def needs(self) -> Sequence[Path]:
        """Return the files and folders that must exist."""

    @abstractmethod
    def read(self) -> Iterator[dict[str, Any]]:
        """Yield the samples in a fixed order; `image` is a PIL picture or the path of a file, `key` identifies it."""

    def files(self) -> list[str]:
        """Return all files with samples, in a fixed order; their hash identifies the data of a result."""
        return [str(file.resolve()) for path in self.needs() for file in inside(path)]

    @property
    def folder(self) -> Path:
        return Path(self.root).expanduser()

    def missing(self) -> str | None:
        """Return a line with what is missing and how to get it; None if nothing is missing."""
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
        ) as error:  # truncated, or another layout
            raise ValueError(f"{self.folder} cannot be read ({error!r}): fetch it again. {self.fetch}") from error
        if self.samples not in (None, count):
            raise ValueError(
                f"{self.folder} has {count} of {self.samples} samples, so its score could not be compared: fetch "
                f"it again, or set its samples to null. {self.fetch}"
            )


@dataclass(frozen=True)
class Labelled(Source):
    """A source whose json has `label`: an index into `classes()`, or 1 or 0 for each class."""

    @abstractmethod
    def classes(self) -> Sequence[str]:
        """Return the names of the classes."""

    @abstractmethod
    def templates(self) -> Sequence[str]:
        """Return the prompts of this data set; `{c}` is the class. Source: clip_benchmark, for all of them."""


@dataclass(frozen=True)
class Annotated(Source):
    """A folder of pictures and one file of annotations."""

    pictures: str
    annotations: str

    def needs(self) -> Sequence[Path]:
        return [self.folder / self.pictures, self.folder / self.annotations]


def present(benchmarks: Mapping[str, T], sources: Mapping[str, Source]) -> dict[str, T]:
    """Return the benchmarks whose data is there, and print what to fetch for each of the others.

    Args:
        benchmarks: All benchmarks by name.
        sources: The sources of those that read a published set.

    Raises:
        ValueError: No benchmark has its data.
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
    """Return the file, or all files in a folder, at any depth."""
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]


def caption_sample(picture: Path, *captions: str) -> dict[str, Any]:
    """Return a sample of a picture with its captions; the first one is also its txt."""
    return {"key": picture.stem, "image": picture, "txt": captions[0], "json": {"captions": list(captions)}}
