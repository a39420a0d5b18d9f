"""The few scores that a run ends with: which ones, how sure they are, as lines of text and as a picture."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from rich.table import Table
from rich.text import Text

from clipfix.evals.base import Scores
from clipfix.evals.plots import AFTER, BEFORE, INK
from clipfix.results.compare.bootstrap import changes, interval
from clipfix.results.compare.rows import Cell, named

FEWEST, MOST = 5, 8  # lines
BENCHMARK, METRIC = 21, 17  # characters, so that a line has room in 80 columns


@dataclass(frozen=True)
class Headline:
    """One metric: its values in percent, one a column of the run, and how sure its change (or score) is."""

    benchmark: str
    metric: str
    values: Sequence[float]
    change: Cell  # of a run with one column: the score

    @property
    def changed(self) -> bool:
        return len(self.values) == 2


def chosen(values: Mapping[str, Mapping[str, float]], first: str | None) -> list[tuple[str, str]]:
    """Return (benchmark, metric) of the headlines: the `mean` of each benchmark, or its first metric without one.

    Where that makes less than five, further metrics of the same benchmarks follow. At most eight are returned.

    Args:
        values: {benchmark: {metric: percent}}.
        first: The benchmark that the method is about; it comes first.
    """
    ordered = sorted(values, key=lambda name: name != first)
    heads = [(name, "mean" if "mean" in values[name] else next(iter(values[name]))) for name in ordered if values[name]]
    heads = heads[:MOST]
    others = [(name, metric) for name in ordered for metric in values[name] if metric != "ties"]
    more = [pair for pair in others if pair not in heads][: max(0, FEWEST - len(heads))]
    return sorted(heads + more, key=lambda pair: ordered.index(pair[0]))  # stable: a benchmark's head stays first


def headlines(
    scored: Mapping[str, Mapping[str, Scores]], first: str | None, resamples: int, coverage: float, seed: int
) -> list[Headline]:
    """Return the headlines of a run, with the intervals that `run=compare` gives for it.

    Args:
        scored: {column: {benchmark: scores}}, of one column or of `before` and `after`.
        first: As of `chosen`.
        resamples: Samples of the bootstrap.
        coverage: Of the intervals, a share.
        seed: Of the bootstrap.
    """
    *before, after = scored.values()
    found = []
    drawn: dict[str, np.ndarray] = {}
    for benchmark, metric in chosen({name: scores.values for name, scores in after.items()}, first):
        new, old = after[benchmark], before[0][benchmark] if before else None
        metrics = list(new.values)
        if benchmark not in drawn and new.outcomes:
            runs = [(old.outcomes if old else None, new.outcomes)]
            drawn[benchmark] = changes(runs, metrics, resamples, np.random.default_rng(seed))
        bounds = interval(drawn[benchmark][:, 0, metrics.index(metric)], coverage) if benchmark in drawn else None
        values = [scores.values[metric] for scores in (old, new) if scores is not None]
        change = values[1] - values[0] if old else values[0]
        found.append(Headline(benchmark, metric, values, Cell(change, None, bounds, signed=bool(old))))
    return found


def shortened(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"


def table(found: Sequence[Headline], columns: Sequence[str], coverage: float) -> Table:
    """Return the lines as the screen shows them, 80 columns wide at most. A change that is sure is bold."""
    shown = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim", title_justify="left")
    shown.add_column("percent", no_wrap=True)
    shown.add_column("", no_wrap=True)
    for name in (*columns, *(["change"] if len(columns) == 2 else []), f"{coverage:.0%} interval"):
        shown.add_column(name, justify="right", no_wrap=True)
    last = None
    for one in found:
        label = "" if one.benchmark == last else shortened(one.benchmark, BENCHMARK)
        cells = [Text(f"{value:.1f}") for value in one.values]
        cells += [Text(str(one.change), style="bold" if one.change.sure else "")] if one.changed else []
        shown.add_row(label, shortened(named(one.metric), METRIC), *cells, one.change.bounds)
        last = one.benchmark
    return shown


def picture(found: Sequence[Headline], columns: Sequence[str]) -> Figure | None:
    """Return bars of the headlines, at most 1,200 x 900 pixels at 150 dpi; None where there are none."""
    if not found:
        return None
    figure = Figure(figsize=(8, min(6, 1.1 + 0.45 * len(found))), layout="constrained")
    axis = figure.subplots()
    for i, (column, colour) in enumerate(zip(columns, (BEFORE, AFTER), strict=False)):
        places = [row + 0.19 * (2 * i - len(columns) + 1) for row in range(len(found))]
        axis.barh(places, [one.values[i] for one in found], height=0.38, color=colour, label=column)
    labels = [
        f"{shortened(one.benchmark, BENCHMARK)}, {shortened(named(one.metric), METRIC)}".replace("_", " ")
        for one in found
    ]
    axis.set(yticks=range(len(found)), yticklabels=labels, xlim=(0, 100), xlabel="percent")
    axis.invert_yaxis()
    for row, one in enumerate(found):
        text = str(one.change) + (f"  ({one.change.bounds})" if one.change.interval else "")
        weight = "bold" if one.change.sure else "normal"
        axis.annotate(
            text, (1.01, row), xycoords=("axes fraction", "data"), va="center", fontsize=9, color=INK, fontweight=weight
        )
    axis.spines[["top", "right"]].set_visible(False)
    if len(columns) > 1:
        figure.legend(loc="outside upper left", frameon=False, ncols=2)
    return figure
