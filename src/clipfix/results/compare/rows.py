"""The rows of a comparison, one per metric, and the tables that show them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

from clipfix.results.compare.bootstrap import changes, interval, over_seeds
from clipfix.results.compare.results import Group
from clipfix.results.screen import one_line, plain_table

Interval = tuple[float, float]
TITLE = "Scores in percent, changes in points"
FEW = 4  # metrics of a benchmark without a mean in the summary; more, such as a curve over lengths, are drawn


@dataclass(frozen=True)
class Cell:
    """One number of the table: a change or a score of a group, or the difference of two groups.

    Args:
        mean: Mean over seeds, in points.
        sd: Standard deviation over seeds; None for one seed.
        interval: Interval of the mean; None without outcomes.
        before: Mean score before training.
        signed: Whether it is a change or difference, shown with its sign.
    """

    mean: float
    sd: float | None
    interval: Interval | None
    before: float | None = None
    signed: bool = True

    def __str__(self) -> str:
        return number(self.mean, self.signed) + (f" ± {self.sd:.1f}" if self.sd is not None else "")

    @property
    def significant(self) -> bool:
        """Whether it is a change whose interval excludes zero."""
        return self.signed and self.interval is not None and (self.interval[0] > 0 or self.interval[1] < 0)

    @property
    def bounds(self) -> str:
        """The interval as text; "" without one."""
        if self.interval is None:
            return ""
        return f"{number(self.interval[0], self.signed)} to {number(self.interval[1], self.signed)}"


@dataclass(frozen=True)
class Published:
    """A published number for the method and backbone of a group.

    Args:
        by: Name of the publication.
        numbers: Percent before and after, as text.
        source: Where it is published.
    """

    by: str
    numbers: str
    source: str


@dataclass(frozen=True)
class Row:
    """One metric of a benchmark.

    Args:
        benchmark: Name of the benchmark.
        metric: Name of the metric.
        cells: One cell per group; None if the group was not scored.
        difference: Second group minus first; None unless there are two groups that were both scored.
        published: Published numbers.
    """

    benchmark: str
    metric: str
    cells: Sequence[Cell | None]
    difference: Cell | None
    published: Sequence[Published]

    @property
    def label(self) -> str:
        """The metric for display."""
        return readable(self.metric)

    @property
    def published_line(self) -> str:
        """Published numbers with their sources, in one line."""
        return "; ".join(f"{one.by} {one.numbers} ({one.source})" for one in self.published)


def readable(metric: str) -> str:
    """Return the name of a metric for display."""
    return metric.replace("_", " ") + (" (count)" if metric == "ties" else "")


def number(value: float, signed: bool = True) -> str:
    """Return a number with one decimal. Zero has no sign."""
    text = f"{value:+.1f}" if signed else f"{value:.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text


def summarize(values: Sequence[float]) -> tuple[float, float | None]:
    """Return mean and sample standard deviation; the latter is None for a single value."""
    return fmean(values), stdev(values) if len(values) > 1 else None


def rows(
    groups: Sequence[Group], published: Sequence[Mapping[str, Any]], resamples: int, coverage: float, seed: int
) -> list[Row]:
    """Return one row per metric, in the order of the first file that has it.

    Args:
        groups: The groups of runs.
        published: Published numbers, the entries of conf/published.yaml.
        resamples: Number of bootstrap samples.
        coverage: Coverage of the intervals, from 0 to 1.
        seed: Seed of the bootstrap.
    """
    names = list(dict.fromkeys(name for group in groups for result in group.results for name in result.after))
    by_benchmark: dict[str, list[str]] = {}
    for name in names:
        by_benchmark.setdefault(name.split("/", 1)[0], []).append(name.split("/", 1)[1])
    # If any run has no scores before training, all cells are scores, because changes and scores do not compare.
    changed = all(result.before is not None for group in groups for result in group.results)
    all_rows = []
    for benchmark, metrics in by_benchmark.items():
        samples = group_samples(groups, benchmark, metrics, resamples, changed, np.random.default_rng(seed))
        for k, metric in enumerate(metrics):
            name = f"{benchmark}/{metric}"
            cells = [
                cell(group, name, None if one is None else interval(one[:, k], coverage), changed)
                if group.has(name)
                else None
                for group, one in zip(groups, samples, strict=True)
            ]
            difference = None
            if len(groups) == 2 and all(cells):
                bounds = None
                if all(one is not None for one in samples):
                    bounds = interval(samples[1][:, k] - samples[0][:, k], coverage)  # type: ignore[index]
                difference = difference_cell(groups, name, bounds, changed)
            quoted = published_numbers(published, groups, benchmark, metric)
            all_rows.append(Row(benchmark, metric, cells, difference, quoted))
    return all_rows


def group_samples(
    groups: Sequence[Group],
    benchmark: str,
    metrics: Sequence[str],
    resamples: int,
    changed: bool,
    rng: np.random.Generator,
) -> list[np.ndarray | None]:
    """Return [resamples, metrics] bootstrap samples of the mean over seeds for each group; None without outcomes.

    Groups with the same seeds use the same samples of seeds, because runs of one seed share data order and noise.

    Args:
        groups: The groups of runs.
        benchmark: Name of the benchmark.
        metrics: Its metrics.
        resamples: Number of samples.
        changed: Whether changes rather than scores are sampled.
        rng: The random generator.
    """
    recorded = [all(benchmark in result.outcomes_after for result in group.results) for group in groups]
    runs = [
        (result.outcomes_before[benchmark] if changed else None, result.outcomes_after[benchmark])
        for group, has in zip(groups, recorded, strict=True)
        if has
        for result in group.results
    ]
    if not runs:
        return [None] * len(groups)
    by_run = changes(runs, metrics, resamples, rng)
    shares: dict[str, np.ndarray] = {}
    samples: list[np.ndarray | None] = []
    start = 0
    for group, has in zip(groups, recorded, strict=True):
        if not has:
            samples.append(None)
            continue
        seeds = str(group.seeds)
        if seeds not in shares:
            shares[seeds] = over_seeds(len(group.results), resamples, rng)
        of_group = by_run[:, start : start + len(group.results)]
        start += len(group.results)
        samples.append(np.einsum("bs,bsm->bm", shares[seeds], of_group))
    return samples


def cell(group: Group, name: str, bounds: Interval | None, changed: bool) -> Cell:
    """Return the cell of a group for <benchmark>/<metric>."""
    results = group.results
    before = fmean(result.before[name] for result in results if result.before) if changed else None
    mean, sd = summarize([result.change(name) if changed else result.after[name] for result in results])
    return Cell(mean, sd, bounds, before, signed=changed)


def difference_cell(groups: Sequence[Group], name: str, bounds: Interval | None, changed: bool) -> Cell:
    """Return the second group minus the first.

    With the same seeds, the standard deviation is that of the differences between runs of one seed; else it is None.
    """
    first, second = (
        [result.change(name) if changed else result.after[name] for result in group.results] for group in groups
    )
    if groups[0].seeds == groups[1].seeds:
        mean, sd = summarize([b - a for a, b in zip(first, second, strict=True)])
    else:
        mean, sd = fmean(second) - fmean(first), None
    return Cell(mean, sd, bounds)


def published_numbers(
    published: Sequence[Mapping[str, Any]], groups: Sequence[Group], benchmark: str, metric: str
) -> list[Published]:
    """Return the published numbers for the methods and backbones of the groups, each once."""
    unique: dict[tuple[str, str, str], None] = {}
    for entry in published:
        if (entry["benchmark"], entry["metric"]) != (benchmark, metric):
            continue
        for group in groups:
            if (entry["method"], entry["backbone"]) == (group.fact("method"), group.fact("backbone")):
                source = f"arXiv {entry['source']}" + ("" if entry["verified"] else "; not verified")
                steps = [f"{entry[key]:.1f}" for key in ("before", "after") if entry[key] is not None]
                unique[entry["by"], " → ".join(steps), source] = None
    return [Published(*one) for one in unique]


def same_start(all_rows: Sequence[Row]) -> bool:
    """Return whether all groups have the same scores before training, so that one column is enough."""
    return all(
        abs(one.before - row.cells[0].before) < 0.05
        for row in all_rows
        for one in row.cells
        if one and one.before is not None and row.cells[0] and row.cells[0].before is not None
    )


def summary(all_rows: Sequence[Row]) -> list[Row]:
    """Return the row of the mean of each benchmark, or all rows of a benchmark without a mean and with few metrics."""
    short = []
    for of_benchmark in sections(all_rows).values():
        means = [row for row in of_benchmark if row.metric == "mean"]
        short += means or (of_benchmark if len(of_benchmark) <= FEW else [])
    return short


def sections(all_rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Return {benchmark: its rows}."""
    by_benchmark: dict[str, list[Row]] = {}
    for row in all_rows:
        by_benchmark.setdefault(row.benchmark, []).append(row)
    return by_benchmark


def is_change(all_rows: Sequence[Row]) -> bool:
    """Return whether the cells are changes rather than scores."""
    return any(one and one.signed for row in all_rows for one in row.cells)


# -- tables ------------------------------------------------------------------------------------------------------------


def summary_table(groups: Sequence[Group], all_rows: Sequence[Row], coverage: float) -> Table:
    """Return the table for the screen, which fits 80 columns: each metric is a section, each group a line.

    Groups are numbered, unless there is only one; `legend` has their names.
    """
    changed, numbered = is_change(all_rows), len(groups) > 1
    shown = plain_table(TITLE if changed else "Scores in percent")
    shown.add_column("benchmark")
    if numbered:
        shown.add_column("run", no_wrap=True)
    if changed:
        shown.add_column("before", justify="right", no_wrap=True)
    shown.add_column("change ± sd" if changed else "score ± sd", justify="right", no_wrap=True)
    shown.add_column(f"{coverage:.0%} interval", justify="right", no_wrap=True)
    for row in all_rows:
        title = row.benchmark if row.metric == "mean" else f"{row.benchmark}, {row.label}"
        lines = [(str(i), one) for i, one in enumerate(row.cells, 1)] + [("2 - 1", row.difference)]
        for run, one in lines:
            if one is not None:
                before = "" if one.before is None else number(one.before, signed=False)
                cells = [*([run] if numbered else []), *([before] if changed else [])]
                value = Text(str(one), style="bold" if one.significant else "")
                shown.add_row(one_line(title), *cells, value, one.bounds)
                title = ""
        if numbered:
            shown.add_section()
    return shown


def legend(groups: Sequence[Group], all_rows: Sequence[Row]) -> Iterator[str]:
    """Yield lines below `summary_table`: the groups by number, their settings, and published numbers."""
    for i, group in enumerate(groups, 1):
        yield f"{i}  {group.name}, {group.amount}"
        yield from (f"     {key}={value}" for key, value in group.differs.items())
    if published := [(row, one) for row in all_rows for one in row.published]:
        yield "Published (sources in report.html):"
        yield from (f"   {row.benchmark}, {row.label}: {one.by} {one.numbers}" for row, one in published)


def table(groups: Sequence[Group], all_rows: Sequence[Row], coverage: float) -> Table:
    """Return the table for scores.txt: benchmarks as sections, metrics as rows, groups as columns."""
    changed, together = is_change(all_rows), same_start(all_rows)
    what = "change" if changed else "score"
    shown = plain_table(TITLE if changed else "Scores in percent")
    shown.add_column("benchmark")
    shown.add_column("metric")
    for i, group in enumerate(groups):
        if changed and not (together and i):
            shown.add_column("before" if together else f"{group.name}, before", justify="right")
        shown.add_column(f"{group.name}, {group.amount}: {what} ± sd", justify="right")
        shown.add_column(f"{coverage:.0%} interval", justify="right")
    if len(groups) == 2:
        shown.add_column("difference, second - first", justify="right")
        shown.add_column(f"{coverage:.0%} interval", justify="right")
    published = any(row.published for row in all_rows)
    if published:
        shown.add_column("published")
    last = None
    for row in all_rows:
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
            texts.append(row.published_line)
        shown.add_row("" if row.benchmark == last else row.benchmark, row.label, *texts)
        last = row.benchmark
    return shown
