"""Retrieval examples: images whose caption changed its rank most from before to after training."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pkgutil import resolve_name
from random import Random
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from braceexpand import braceexpand
from matplotlib.figure import Figure
from PIL import Image

from clipfix.data.sets import Source
from clipfix.results.compare.results import PLACES, Group

QUESTION = "image_to_text"  # the rank of the caption of an image among all captions


@dataclass(frozen=True)
class Case:
    """One image with its captions.

    Args:
        image: The image.
        texts: Its captions.
        before: Rank of its captions before training, the median over seeds of the first group.
        after: {group: rank after training, the median over seeds}.
        benchmark: Name of the benchmark.
        better: Whether the rank improved in the first group.
    """

    image: Image.Image
    texts: Sequence[str]
    before: int
    after: Mapping[str, int]
    benchmark: str
    better: bool

    @property
    def lines(self) -> list[tuple[str, bool | None]]:
        """Return (text, whether the rank improved) of each group; None for an equal rank."""
        return [
            (f"{name}: rank {self.before} → {rank}", None if rank == self.before else rank < self.before)
            for name, rank in self.after.items()
        ]


def changed(groups: Sequence[Group], amount: int, places: str = "files") -> tuple[list[Case], list[str]]:
    """Return the images whose rank changed most in the first group, or the reason why there are none.

    Half of them improved and half got worse. Changes are compared as factors: 20 to 2 equals 200 to 20. Images are read
    from the shards or the published data set that the result file names.

    Args:
        groups: Groups of runs.
        amount: Number of images.
        places: What is read: only local files, also urls, or also the output of commands.
    """
    largest = largest_change(groups)
    if amount == 0 or largest is None:
        return [], []
    benchmark, items, before, after = largest
    factors = np.log(after[0] / before)
    order = np.argsort(factors, kind="stable")
    half = -(-amount // 2)
    wanted = [i for i in order[:half] if factors[i] < 0] + [i for i in order[::-1][: amount - half] if factors[i] > 0]
    settings = (groups[0].fact("benchmarks") or {}).get(benchmark) or {}
    if not settings.get("shards"):
        return [], [f"No examples: the result file does not name the shards of {benchmark}."]
    try:
        samples = read_samples(settings, {str(items[i]) for i in wanted}, places)
    except (
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        OSError,
    ) as error:  # settings of any types, in a result file
        return [], [f"No examples: the images of {benchmark} cannot be read: {error}"]
    if absent := {str(items[i]) for i in wanted} - samples.keys():
        return [], [f"No examples: the data of {benchmark} no longer contains {', '.join(sorted(absent))}."]
    cases = []
    for i in wanted:
        sample = samples[str(items[i])]
        ranks = {group.name: round(float(one[i])) for group, one in zip(groups, after, strict=True)}
        better = bool(factors[i] < 0)
        cases.append(Case(sample["image"], sample["texts"], round(float(before[i])), ranks, benchmark, better))
    return cases, []


def largest_change(groups: Sequence[Group]) -> tuple[str, np.ndarray, np.ndarray, list[np.ndarray]] | None:
    """Return the retrieval benchmark whose mean changed most in the first group, its items, and their ranks.

    The ranks are those before training, and those after training by group. None if there is no such benchmark.
    """
    runs = [result for group in groups for result in group.results]
    candidates = [
        benchmark
        for benchmark, recorded in groups[0].results[0].outcomes_before.items()
        if QUESTION in recorded and all(benchmark in run.outcomes_before for run in runs)
    ]
    if not candidates:
        return None
    name = max(candidates, key=lambda one: abs(sum(run.change(f"{one}/mean") for run in groups[0].results)))
    first = groups[0].results[0].outcomes_before[name][QUESTION]

    def median(side: str, results: Sequence[Any]) -> np.ndarray:
        return np.median([getattr(result, side)[name][QUESTION].ranks for result in results], axis=0)

    after = [median("outcomes_after", group.results) for group in groups]
    return name, first.items, median("outcomes_before", groups[0].results), after


def read_samples(settings: Mapping[str, Any], keys: set[str], places: str = "files") -> dict[str, dict[str, Any]]:
    """Return {key: image and captions} of the samples with these keys; a key is that of `embed.apart`.

    Args:
        settings: The settings of the benchmark in the result file.
        keys: The keys of the samples.
        places: As in `changed`. `allow_pipe` of the result file does not count.

    Raises:
        ValueError: They cannot be read, or are in another place.
    """
    from clipfix.data.decoding import samples
    from clipfix.data.texts import Text
    from clipfix.evals.embed import apart, load_rgb

    text, shards = Text(**settings["text"]), settings["shards"]
    by_key: dict[str, dict[str, Any]] = {}
    if not isinstance(shards, Mapping):
        check_places(shards, places)
    for sample in apart(published(shards) if isinstance(shards, Mapping) else samples(shards, allow_pipe=True)):
        if sample["key"] in keys - by_key.keys():
            texts = text.draw(sample, Random(sample["key"]))
            by_key[sample["key"]] = {"image": load_rgb(sample["image"]), "texts": texts}
        if len(by_key) == len(keys):
            break
    return by_key


def check_places(shards: str | Sequence[str], places: str) -> None:
    """Raise ValueError if shards that a result file names are not in the places that this run allows."""
    entries = [shards] if isinstance(shards, str) else shards
    for url in [url for entry in entries for url in braceexpand(entry)]:
        scheme = urlsplit(url).scheme
        place = "commands" if scheme == "pipe" else "urls" if scheme else "files"
        if PLACES.index(place) > PLACES.index(places):
            what = "shell command" if place == "commands" else "url"
            raise ValueError(
                f"the result file names the {what} {url}. If you trust it, set compare.examples_from={place}"
            )


def published(settings: Mapping[str, Any]) -> Source:
    """Return the data set with these settings.

    Raises:
        ValueError: The class is not in clipfix.data.sets. A result file may not run other code.
    """
    name, kind = str(settings.get("_target_")), None
    if name.startswith("clipfix.data.sets."):
        with suppress(ImportError, AttributeError, ValueError):
            kind = resolve_name(name)
    if not (isinstance(kind, type) and issubclass(kind, Source)):
        raise ValueError(f"{name} is not a data set of clipfix.data.sets")
    try:
        return kind(**{key: value for key, value in settings.items() if not key.startswith("_")})
    except TypeError as error:
        raise ValueError(f"{name} has other arguments ({error})") from error


def picture(cases: Sequence[Case]) -> Figure:
    """Return a figure of all cases."""
    from clipfix.evals.plots import Cell, gallery

    cells = [
        Cell(case.image, "better" if case.better else "worse", [*case.lines, (case.texts[0], None)]) for case in cases
    ]
    return gallery(cells, across=3, characters=38)
