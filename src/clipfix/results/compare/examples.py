"""Retrieval examples that changed: a picture, its caption, and the caption's rank before and after."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pkgutil import resolve_name
from random import Random
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from clipfix.data.sets import Source
from clipfix.results.compare.results import Group

WAY = "image_to_text"  # the rank of the own caption among all captions


@dataclass(frozen=True)
class Case:
    """One picture; ranks are medians over seeds, per group by name."""

    image: Image.Image
    texts: Sequence[str]
    before: int
    after: Mapping[str, int]
    benchmark: str
    better: bool

    @property
    def lines(self) -> list[tuple[str, bool | None]]:
        """What each group made of it, and whether that is better than before."""
        return [
            (f"{name}: rank {self.before} → {rank}", None if rank == self.before else rank < self.before)
            for name, rank in self.after.items()
        ]


def changed(groups: Sequence[Group], amount: int) -> tuple[list[Case], list[str]]:
    """The pictures whose rank rose and fell most in the first group, half of each; and why there are none, in a line.

    Ranks change by factors: from 20 to 2 says as much as from 200 to 20. Pictures are read from the benchmark's shards
    or published data set, where they still lie as the result file says.
    """
    found = most_moved(groups)
    if amount == 0 or found is None:
        return [], []
    benchmark, items, before, after = found
    factors = np.log(after[0] / before)
    order = np.argsort(factors, kind="stable")
    half = -(-amount // 2)
    wanted = [i for i in order[:half] if factors[i] < 0] + [i for i in order[::-1][: amount - half] if factors[i] > 0]
    asked = (groups[0].fact("benchmarks") or {}).get(benchmark) or {}
    if not asked.get("shards"):
        return [], [f"No examples: {benchmark} does not say which shards its pictures lie in."]
    try:
        samples = fetch(asked, {str(items[i]) for i in wanted})
    except ValueError as error:
        return [], [f"No examples, as the pictures of {benchmark} cannot be read: {error}"]
    if absent := {str(items[i]) for i in wanted} - samples.keys():
        return [], [f"No examples: the data of {benchmark} no longer holds {', '.join(sorted(absent))}."]
    cases = []
    for i in wanted:
        sample = samples[str(items[i])]
        ranks = {group.name: round(float(one[i])) for group, one in zip(groups, after, strict=True)}
        better = bool(factors[i] < 0)
        cases.append(Case(sample["image"], sample["texts"], round(float(before[i])), ranks, benchmark, better))
    return cases, []


def most_moved(groups: Sequence[Group]) -> tuple[str, np.ndarray, np.ndarray, list[np.ndarray]] | None:
    """The retrieval benchmark that changed most in the first group: its items, and their ranks before and after."""
    runs = [result for group in groups for result in group.results]
    having = [
        benchmark
        for benchmark, found in groups[0].results[0].outcomes_before.items()
        if WAY in found and all(benchmark in run.outcomes_before for run in runs)
    ]
    if not having:
        return None
    name = max(having, key=lambda one: abs(sum(run.change(f"{one}/mean") for run in groups[0].results)))
    first = groups[0].results[0].outcomes_before[name][WAY]

    def median(side: str, results: Sequence[Any]) -> np.ndarray:
        return np.median([getattr(result, side)[name][WAY].ranks for result in results], axis=0)

    after = [median("outcomes_after", group.results) for group in groups]
    return name, first.items, median("outcomes_before", groups[0].results), after


def fetch(asked: Mapping[str, Any], keys: set[str]) -> dict[str, dict[str, Any]]:
    """Picture and captions by key; the first sample of a key counts."""
    from clipfix.data.decoding import samples
    from clipfix.data.texts import Text
    from clipfix.evals.embed import load_rgb

    text, shards = Text(**asked["text"]), asked["shards"]
    found: dict[str, dict[str, Any]] = {}
    for sample in published(shards) if isinstance(shards, Mapping) else samples(shards, bool(asked.get("allow_pipe"))):
        if sample["key"] in keys - found.keys():
            texts = text.draw(sample, Random(sample["key"]))
            found[sample["key"]] = {"image": load_rgb(sample["image"]), "texts": texts}
        if len(found) == len(keys):
            break
    return found


def published(settings: Mapping[str, Any]) -> Source:
    """The data set of these settings. Only one of clipfix.data.sets: a result file must not choose what else is run."""
    named = str(settings.get("_target_"))
    kind = resolve_name(named) if named.startswith("clipfix.data.sets.") else None
    if not (isinstance(kind, type) and issubclass(kind, Source)):
        raise ValueError(f"{named} is no data set of clipfix.data.sets")
    return kind(**{key: value for key, value in settings.items() if not key.startswith("_")})


def picture(cases: Sequence[Case]) -> Figure:
    """All cases as one grid."""
    from clipfix.evals.plots import Cell, gallery

    cells = [
        Cell(case.image, "better" if case.better else "worse", [*case.lines, (case.texts[0], None)]) for case in cases
    ]
    return gallery(cells, across=3, characters=38)
