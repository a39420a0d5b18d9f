"""Headlines: the few scores printed at the end of a run, with intervals, as a table and as a figure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from rich.table import Table
from rich.text import Text

from clipfix.evals.base import Scores
from clipfix.evals.plots import AFTER, BEFORE, INK
from clipfix.results.compare.bootstrap import changes, interval
from clipfix.results.compare.rows import Cell, readable

FEWEST, MOST = 5, 8  # headlines
BENCHMARK, METRIC = 21, 17  # maximum characters, so that a line fits 80 columns


@dataclass(frozen=True)
class Headline:
    """One metric of a run.

    Args:
        benchmark: Name of the benchmark.
        metric: Name of the metric.
        values: Percent in each column of the run.
        change: The change, with its interval; for a run with one column the score.
    """

    benchmark: str
    metric: str
    values: Sequence[float]
    change: Cell

    @property
    def changed(self) -> bool:
        """Whether the run has scores before and after."""
        return len(self.values) == 2


def choose(values: Mapping[str, Mapping[str, float]], first: str | None) -> list[tuple[str, str]]:
    """Return (benchmark, metric) of each headline: the `mean` of every benchmark, or its first metric if it has none.

    If these are fewer than five, further metrics of the same benchmarks are added. There are at most eight.

    Args:
        values: {benchmark: {metric: percent}}.
        first: The benchmark that comes first.
    """
    ordered = sorted(values, key=lambda name: name != first)
    heads = [(name, "mean" if "mean" in values[name] else next(iter(values[name]))) for name in ordered if values[name]]
    heads = heads[:MOST]
    others = [(name, metric) for name in ordered for metric in values[name] if metric != "ties"]
    more = [pair for pair in others if pair not in heads][: max(0, FEWEST - len(heads))]
    return sorted(
        heads + more, key=lambda pair: ordered.index(pair[0])
    )  # the sort is stable: the first metric of a benchmark stays first


def headlines(
    scored: Mapping[str, Mapping[str, Scores]], first: str | None, resamples: int, coverage: float, seed: int
) -> list[Headline]:
    """Return the headlines of a run, with the same intervals as `run=compare`.

    Args:
        scored: {column: {benchmark: scores}}, with one column, or `before` and `after`.
        first: The benchmark that comes first.
        resamples: Number of bootstrap samples.
        coverage: Coverage of the intervals, from 0 to 1.
        seed: Seed of the bootstrap.
    """
    *before, after = scored.values()
    heads = []
    samples: dict[str, np.ndarray] = {}
    for benchmark, metric in choose({name: scores.values for name, scores in after.items()}, first):
        new, old = after[benchmark], before[0][benchmark] if before else None
        metrics = list(new.values)
        if benchmark not in samples and new.outcomes:
            runs = [(old.outcomes if old else None, new.outcomes)]
            samples[benchmark] = changes(runs, metrics, resamples, np.random.default_rng(seed))
        bounds = None
        if benchmark in samples:
            bounds = interval(samples[benchmark][:, 0, metrics.index(metric)], coverage)
        values = [scores.values[metric] for scores in (old, new) if scores is not None]
        change = values[1] - values[0] if old else values[0]
        heads.append(Headline(benchmark, metric, values, Cell(change, None, bounds, signed=bool(old))))
    return heads


def shorten(text: str, length: int) -> str:
    """Return a text of at most `length` characters, with an ellipsis if it was longer."""
    return text if len(text) <= length else f"{text[: length - 1]}…"


def table(heads: Sequence[Headline], columns: Sequence[str], coverage: float) -> Table:
    """Return a table of at most 80 columns. Changes whose interval excludes zero are bold."""
    shown = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim", title_justify="left")
    shown.add_column("percent", no_wrap=True)
    shown.add_column("", no_wrap=True)
    for name in (*columns, *(["change"] if len(columns) == 2 else []), f"{coverage:.0%} interval"):
        shown.add_column(name, justify="right", no_wrap=True)
    last = None
    for one in heads:
        label = "" if one.benchmark == last else shorten(one.benchmark, BENCHMARK)
        cells = [Text(f"{value:.1f}") for value in one.values]
        cells += [Text(str(one.change), style="bold" if one.change.significant else "")] if one.changed else []
        shown.add_row(label, shorten(readable(one.metric), METRIC), *cells, one.change.bounds)
        last = one.benchmark
    return shown


def picture(heads: Sequence[Headline], columns: Sequence[str]) -> Figure | None:
    """Return a bar chart of the headlines, at most 1,200 x 900 pixels at 150 dpi; None without headlines."""
    if not heads:
        return None
    figure = Figure(figsize=(8, min(6, 1.1 + 0.45 * len(heads))), layout="constrained")
    axis = figure.subplots()
    for i, (column, colour) in enumerate(zip(columns, (BEFORE, AFTER), strict=False)):
        places = [row + 0.19 * (2 * i - len(columns) + 1) for row in range(len(heads))]
        axis.barh(places, [one.values[i] for one in heads], height=0.38, color=colour, label=column)
    labels = [
        f"{shorten(one.benchmark, BENCHMARK)}, {shorten(readable(one.metric), METRIC)}".replace("_", " ")
        for one in heads
    ]
    axis.set(yticks=range(len(heads)), yticklabels=labels, xlim=(0, 100), xlabel="percent")
    axis.invert_yaxis()
    for row, one in enumerate(heads):
        text = str(one.change) + (f"  ({one.change.bounds})" if one.change.interval else "")
        weight = "bold" if one.change.significant else "normal"
        axis.annotate(
            text, (1.01, row), xycoords=("axes fraction", "data"), va="center", fontsize=9, color=INK, fontweight=weight
        )
    axis.spines[["top", "right"]].set_visible(False)
    if len(columns) > 1:
        figure.legend(loc="outside upper left", frameon=False, ncols=2)
    return figure
