"""One row per metric: before, change and interval of every group, and the difference of two."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

import numpy as np
from rich.table import Table

from clipfix.results.compare.bootstrap import changes, interval, over_seeds
from clipfix.results.compare.results import Group

Interval = tuple[float, float]
TITLE = "Scores in percent, changes in points"
FEW = 4  # metrics that stand for a benchmark without a mean; more, like a curve over lengths, are drawn


@dataclass(frozen=True)
class Cell:
    """A mean over seeds in points, its standard deviation (None of one seed), and its interval (None: no outcomes)."""

    mean: float
    sd: float | None
    interval: Interval | None
    before: float | None = None
    signed: bool = True

    def __str__(self) -> str:
        return number(self.mean, self.signed) + (f" ± {self.sd:.1f}" if self.sd is not None else "")

    @property
    def sure(self) -> bool:
        """Whether the interval leaves zero out."""
        return self.signed and self.interval is not None and (self.interval[0] > 0 or self.interval[1] < 0)

    @property
    def bounds(self) -> str:
        if self.interval is None:
            return ""
        return f"{number(self.interval[0], self.signed)} to {number(self.interval[1], self.signed)}"


@dataclass(frozen=True)
class Published:
    """A number that somebody else gives for a group."""

    by: str
    numbers: str
    source: str


@dataclass(frozen=True)
class Row:
    benchmark: str
    metric: str
    cells: Sequence[Cell | None]  # per group; None where it was not scored
    difference: Cell | None  # second group minus first
    published: Sequence[Published]

    @property
    def label(self) -> str:
        return named(self.metric)

    @property
    def elsewhere(self) -> str:
        """Published numbers with their sources, in one line."""
        return "; ".join(f"{one.by} {one.numbers} ({one.source})" for one in self.published)


def named(metric: str) -> str:
    """A metric as people read it."""
    return metric.replace("_", " ") + (" (count)" if metric == "ties" else "")


def number(value: float, signed: bool = True) -> str:
    text = f"{value:+.1f}" if signed else f"{value:.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text


def summarize(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation; none of a single value."""
    return fmean(values), stdev(values) if len(values) > 1 else None


def rows(
    groups: Sequence[Group], published: Sequence[Mapping[str, Any]], resamples: int, coverage: float, seed: int
) -> list[Row]:
    """All metrics, in the order of the first file that has them."""
    names = list(dict.fromkeys(name for group in groups for result in group.results for name in result.after))
    by_benchmark: dict[str, list[str]] = {}
    for name in names:
        by_benchmark.setdefault(name.split("/", 1)[0], []).append(name.split("/", 1)[1])
    # A second group's change stands against the first's; where one of them was only scored, scores do.
    changed = all(result.before is not None for group in groups for result in group.results)
    found = []
    for benchmark, metrics in by_benchmark.items():
        drawn = draws(groups, benchmark, metrics, resamples, changed, np.random.default_rng(seed))
        for k, metric in enumerate(metrics):
            name = f"{benchmark}/{metric}"
            cells = [
                cell(group, name, None if one is None else interval(one[:, k], coverage), changed)
                if group.has(name)
                else None
                for group, one in zip(groups, drawn, strict=True)
            ]
            difference = None
            if len(groups) == 2 and all(cells):
                bounds = None
                if all(one is not None for one in drawn):
                    bounds = interval(drawn[1][:, k] - drawn[0][:, k], coverage)  # type: ignore[index]
                difference = apart(groups, name, bounds, changed)
            found.append(Row(benchmark, metric, cells, difference, told(published, groups, benchmark, metric)))
    return found


def draws(
    groups: Sequence[Group],
    benchmark: str,
    metrics: Sequence[str],
    resamples: int,
    changed: bool,
    rng: np.random.Generator,
) -> list[np.ndarray | None]:
    """Per group [resamples, metrics], mean over its seeds; None for a group without outcomes.

    Groups of the same seeds meet the same draws of seeds: a seed's data order and noise are common to them.
    """
    known = [all(benchmark in result.outcomes_after for result in group.results) for group in groups]
    runs = [
        (result.outcomes_before[benchmark] if changed else None, result.outcomes_after[benchmark])
        for group, has in zip(groups, known, strict=True)
        if has
        for result in group.results
    ]
    if not runs:
        return [None] * len(groups)
    by_run = changes(runs, metrics, resamples, rng)
    shares: dict[str, np.ndarray] = {}
    found: list[np.ndarray | None] = []
    start = 0
    for group, has in zip(groups, known, strict=True):
        if not has:
            found.append(None)
            continue
        seeds = str(group.seeds)
        if seeds not in shares:
            shares[seeds] = over_seeds(len(group.results), resamples, rng)
        mine = by_run[:, start : start + len(group.results)]
        start += len(group.results)
        found.append(np.einsum("bs,bsm->bm", shares[seeds], mine))
    return found


def cell(group: Group, name: str, bounds: Interval | None, changed: bool) -> Cell:
    results = group.results
    before = fmean(result.before[name] for result in results if result.before) if changed else None
    mean, sd = summarize([result.change(name) if changed else result.after[name] for result in results])
    return Cell(mean, sd, bounds, before, signed=changed)


def apart(groups: Sequence[Group], name: str, bounds: Interval | None, changed: bool) -> Cell:
    """Second group minus first; its standard deviation is of the differences seed by seed, where seeds are the same."""
    first, second = (
        [result.change(name) if changed else result.after[name] for result in group.results] for group in groups
    )
    if groups[0].seeds == groups[1].seeds:
        mean, sd = summarize([b - a for a, b in zip(first, second, strict=True)])
    else:
        mean, sd = fmean(second) - fmean(first), None
    return Cell(mean, sd, bounds)


def told(
    published: Sequence[Mapping[str, Any]], groups: Sequence[Group], benchmark: str, metric: str
) -> list[Published]:
    """What others give for these groups: before the repair, after it, and where that stands."""
    found: dict[tuple[str, str, str], None] = {}
    for entry in published:
        if (entry["benchmark"], entry["metric"]) != (benchmark, metric):
            continue
        for group in groups:
            if (entry["method"], entry["backbone"]) == (group.fact("method"), group.fact("backbone")):
                source = f"arXiv {entry['source']}" + ("" if entry["verified"] else "; not verified")
                steps = [f"{entry[key]:.1f}" for key in ("before", "after") if entry[key] is not None]
                found[entry["by"], " → ".join(steps), source] = None
    return [Published(*one) for one in found]


def one_start(found: Sequence[Row]) -> bool:
    """Whether all groups began at the same scores, so that one column has them."""
    return all(
        abs(one.before - row.cells[0].before) < 0.05
        for row in found
        for one in row.cells
        if one and one.before is not None and row.cells[0] and row.cells[0].before is not None
    )


def summary(found: Sequence[Row]) -> list[Row]:
    """The mean of each benchmark, or all metrics of one that has but a few."""
    short = []
    for several in sections(found).values():
        means = [row for row in several if row.metric == "mean"]
        short += means or (several if len(several) <= FEW else [])
    return short


def sections(found: Sequence[Row]) -> dict[str, list[Row]]:
    by: dict[str, list[Row]] = {}
    for row in found:
        by.setdefault(row.benchmark, []).append(row)
    return by


def table(groups: Sequence[Group], found: Sequence[Row], coverage: float) -> Table:
    """As the terminal shows it: benchmarks as sections, metrics as rows."""
    changed = found[0].cells and any(one and one.signed for row in found for one in row.cells)
    shown = Table(title=TITLE, title_justify="left")
    shown.add_column("benchmark")
    shown.add_column("metric")
    what = "change" if changed else "score"
    together = one_start(found)
    for i, group in enumerate(groups):
        if changed and not (together and i):
            shown.add_column("before" if together else f"{group.name}, before", justify="right")
        shown.add_column(f"{group.name}, {group.amount}: {what} ± sd", justify="right")
        shown.add_column(f"{coverage:.0%} interval", justify="right", no_wrap=True)
    if len(groups) == 2:
        shown.add_column("difference, second - first", justify="right")
        shown.add_column(f"{coverage:.0%} interval", justify="right", no_wrap=True)
    published = any(row.published for row in found)
    if published:
        shown.add_column("published")
    last = None
    for row in found:
        if last not in (None, row.benchmark):
            shown.add_section()
        texts = []
        for i, one in enumerate(row.cells):
            if changed and not (together and i):
                texts.append("" if one is None or one.before is None else f"{one.before:.1f}")
            texts += ["", ""] if one is None else [str(one), one.bounds]
        if len(groups) == 2:
            texts += ["", ""] if row.difference is None else [str(row.difference), row.difference.bounds]
        if published:
            texts.append(row.elsewhere)
        shown.add_row("" if row.benchmark == last else row.benchmark, row.label, *texts)
        last = row.benchmark
    return shown


def by_group(groups: Sequence[Group], found: Sequence[Row], coverage: float) -> Table:
    """The same for more groups than have room side by side: each metric a section, each group a row."""
    changed = any(one and one.signed for row in found for one in row.cells)
    shown = Table(title=TITLE, title_justify="left")
    shown.add_column("benchmark")
    shown.add_column("runs")
    if changed:
        shown.add_column("before", justify="right")
    shown.add_column("change ± sd" if changed else "score ± sd", justify="right", no_wrap=True)
    shown.add_column(f"{coverage:.0%} interval", justify="right", no_wrap=True)
    published = any(row.published for row in found)
    if published:
        shown.add_column("published")
    for row in found:
        title = row.benchmark if row.metric == "mean" else f"{row.benchmark}, {row.label}"
        said = row.elsewhere
        for group, one in zip(groups, row.cells, strict=True):
            if one is None:
                continue
            before = "" if one.before is None else number(one.before, signed=False)
            cells = [title, f"{group.name}, {group.amount}", *([before] if changed else []), str(one), one.bounds]
            shown.add_row(*cells, *([said] if published else []))
            title = said = ""
        shown.add_section()
    return shown
