"""What a run leaves behind: a before/after table on screen, results as json, pictures as PNG, all of it in W&B too."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, WandbLogger
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.console import Console
from rich.table import Table

from clipfix.evals.base import Benchmark, Scores
from clipfix.evals.outcomes import save as save_outcomes
from clipfix.evals.plots import AFTER, BEFORE
from clipfix.results.compare.rows import named, number
from clipfix.results.record import Percentages, Record

DRAWN = ("train", "val", "denoising", "drift", "positives", "selection", "perf")  # of what is logged, in this order


def describe(config: Mapping[str, Any], loggers: Sequence[Logger]) -> None:
    """The config of a run, nested as it is, for W&B to group and filter by; the csv file has config.yaml beside it."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.log_hyperparams(dict(config))


def write(
    folder: Path,
    scored: Mapping[str, Mapping[str, Scores]],
    benchmarks: Mapping[str, Benchmark],
    record: Record,
    loggers: Sequence[Logger] = (),
) -> None:
    """Table, results.json and pictures of the scores taken (`before`, `after`), in the run folder and every logger.

    outcomes.npz beside results.json has what every item got; `run=compare` reads it.
    """
    record.write(folder)
    scores = record.scores
    scorings = {name: [column[name] for column in scored.values()] for name in benchmarks}
    recorded = {name: [one.outcomes for one in several] for name, several in scorings.items() if several[0].outcomes}
    save_outcomes(folder, list(scored), recorded)
    figures = {"scores": bars(scores), "curves": curves(join_metrics(folder))}
    figures |= {name: benchmark.figure(list(scored), scorings[name]) for name, benchmark in benchmarks.items()}
    pictures = {name: save(figure, folder / f"{name}.png") for name, figure in figures.items() if figure}
    for name, path in pictures.items():
        show(f"report/{name}", path, loggers)
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            for column, values in scores.items():
                logger.log_metrics(values, step=0 if column == "before" else record.step)
            logger.log_table(
                "report/before_after", columns=["score", *scores], data=[[row, *values] for row, values in rows(scores)]
            )
    Console().print(table(scores))
    Console().print(
        f"{record.seconds:.0f} s, peak memory {record.peak_memory_gb} GB. Run folder: {folder}", soft_wrap=True
    )


def save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=150, bbox_inches="tight")
    return path


def show(name: str, picture: Path, loggers: Sequence[Logger]) -> None:
    """A picture, by its name there, in every logger that has room for pictures."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.log_image(name, [str(picture)])


def rows(scores: Mapping[str, Percentages]) -> list[tuple[str, list[float]]]:
    """(score, [value of each column]) in the order of the first column."""
    return [
        (name.removeprefix("eval/"), [column[name] for column in scores.values()])
        for name in next(iter(scores.values()))
    ]


def table(scores: Mapping[str, Percentages]) -> Table:
    """Benchmarks as sections, metrics as rows; the last column is what the run changed."""
    shown = Table(title="Scores in percent", title_justify="left")
    shown.add_column("benchmark")
    shown.add_column("metric")
    for column in scores:
        shown.add_column(column, justify="right")
    change = len(scores) == 2
    if change:
        shown.add_column("change", justify="right")
    last = None
    for name, values in rows(scores):
        benchmark, metric = name.split("/", 1)
        if last not in (None, benchmark):
            shown.add_section()
        cells = [f"{value:.1f}" for value in values]
        if change:
            cells.append(number(values[1] - values[0]))
        shown.add_row("" if benchmark == last else benchmark, named(metric), *cells)
        last = benchmark
    return shown


def bars(scores: Mapping[str, Percentages]) -> Figure | None:
    """Before/after bars, one panel a benchmark."""
    panels: dict[str, list[tuple[str, list[float]]]] = {}
    for name, values in rows(scores):
        benchmark, metric = name.split("/", 1)
        if metric != "ties":
            panels.setdefault(benchmark, []).append((metric.replace("_", " "), values))
    if not panels:
        return None
    heights = [len(metrics) for metrics in panels.values()]
    figure = Figure(figsize=(8, 0.32 * sum(heights) + 0.6 * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), squeeze=False, height_ratios=heights, sharex=True)[:, 0]
    for axis, (benchmark, metrics) in zip(axes, panels.items(), strict=True):
        labels = [metric for metric, _ in metrics]
        for i, (column, colour) in enumerate(zip(scores, (BEFORE, AFTER), strict=False)):
            places = [row + 0.19 * (2 * i - len(scores) + 1) for row in range(len(labels))]
            axis.barh(places, [values[i] for _, values in metrics], height=0.38, color=colour, label=column)
        axis.set(yticks=range(len(labels)), yticklabels=labels, xlim=(0, 100))
        axis.set_title(benchmark.replace("_", " "), loc="left", fontsize=10, fontweight="bold")
        axis.invert_yaxis()
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False, ncols=2, loc="lower right", bbox_to_anchor=(1, 1))
    axes[-1].set_xlabel("percent")
    return figure


def join_metrics(folder: Path) -> list[dict[str, str]]:
    """The csv logger's rows from all starts of this run, also written to metrics.csv; a later start wins its steps."""
    rows: list[dict[str, str]] = []
    for part in sorted(folder.glob("metrics/version_*/metrics.csv"), key=lambda path: int(path.parent.name[8:])):
        with part.open() as file:
            newer = list(csv.DictReader(file))
        first = min((int(row["step"]) for row in newer), default=0)
        rows = [row for row in rows if int(row["step"]) < first] + newer
    if rows:
        with (folder / "metrics.csv").open("w") as file:
            writer = csv.DictWriter(file, fieldnames=list(dict.fromkeys(name for row in rows for name in row)))
            writer.writeheader()
            writer.writerows(rows)
    return rows


def curves(metrics: list[dict[str, str]]) -> Figure | None:
    """Every loss, selection score, note of a method and rate that the csv logger wrote, against the optimizer step."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for row in metrics:
        for name, value in row.items():
            if value and name.split("/")[0] in DRAWN:
                lines.setdefault(name, []).append((int(row["step"]), float(value)))
    if not lines:
        return None
    # train/x and val/x share a panel, and so do the conditions of a generator: their distance is what one looks for.
    panels: dict[str, list[str]] = {}
    for name in sorted(lines, key=lambda name: DRAWN.index(name.split("/")[0])):
        stage, metric = name.split("/", 1)
        shared = {"train": metric, "val": metric, "denoising": "denoising, by condition"}
        panels.setdefault(shared.get(stage, name), []).append(name)
    if sum(name.startswith("train/") for name in lines) == 2:  # a single term is the loss
        panels.pop("loss")
    across = min(3, len(panels))
    down = -(-len(panels) // across)
    figure = Figure(figsize=(4 * across, 2.6 * down), layout="constrained")
    axes = figure.subplots(down, across, squeeze=False).flat
    for axis, (title, names) in zip(axes, panels.items(), strict=False):
        for name, colour in zip(names, (AFTER, "#d1495b", BEFORE), strict=False):
            axis.plot(
                *zip(*lines[name], strict=True), color=colour, marker="." if len(lines[name]) < 20 else "", label=name
            )
        axis.set_title(title.replace("_", " "), fontsize=10)
        axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axis.spines[["top", "right"]].set_visible(False)
        if len(names) > 1:
            axis.legend(frameon=False, fontsize=8)
    for axis in figure.axes[len(panels) :]:
        axis.remove()
    figure.supxlabel("step", fontsize=9)
    return figure
