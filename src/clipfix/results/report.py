"""The report of a run: results.json, scores.txt, figures, the lines on the screen, and the same in W&B."""

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
from clipfix.results.compare.results import comparable, newest
from clipfix.results.compare.rows import number, readable
from clipfix.results.headlines import headlines, picture
from clipfix.results.headlines import table as head_table
from clipfix.results.record import Percentages, Record
from clipfix.results.screen import as_text, one_line, plain_table, relative_path

# Prefixes of logged names whose curves come first, last, or are not drawn. The notes of a method are between them.
FIRST, LAST, NOT_DRAWN = ("train", "val"), ("selection", "perf"), ("data", "optimizer")


def log_config(config: Mapping[str, Any], loggers: Sequence[Logger]) -> None:
    """Log the nested config to W&B, for grouping and filtering. The csv logger has config.yaml in the run folder."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.log_hyperparams(dict(config))


def write(
    folder: Path,
    scored: Mapping[str, Mapping[str, Scores]],
    benchmarks: Mapping[str, Benchmark],
    record: Record,
    loggers: Sequence[Logger] = (),
    *,
    table: str,
    pictures: bool,
    resamples: int,
    coverage: float,
    first: str | None = None,
) -> None:
    """Write the results of a run to its folder and to the loggers, and print the headlines and the files.

    results.json holds all scores and their provenance, outcomes.npz the result for every item, which `run=compare`
    reads, and scores.txt the table of all metrics.

    Args:
        folder: The run folder.
        scored: {column: {benchmark: scores}}, with the columns of `record.scores`.
        benchmarks: The benchmarks by name.
        record: The content of results.json.
        loggers: Loggers of Lightning; only W&B gets scores and pictures.
        table: "headlines" prints a few metrics, "full" all of them.
        pictures: Whether figures are drawn.
        resamples, coverage: Settings of the intervals, see `headlines`.
        first: The benchmark whose headline comes first.
    """
    columns, scores = list(scored), record.scores
    record.write(folder)
    scorings = {name: [column[name] for column in scored.values()] for name in benchmarks}
    recorded = {name: [one.outcomes for one in columns_] for name, columns_ in scorings.items() if columns_[0].outcomes}
    save_outcomes(folder, columns, recorded)
    metrics = join_metrics(folder)
    heads = headlines(scored, first, resamples, coverage, record.seed or 0)
    if heads:
        (folder / "scores.txt").write_text(as_text(full_table(scores)))
    paths: dict[str, Path] = {}
    if pictures:
        figures = {"scores": picture(heads, columns), "scores_all": bars(scores), "curves": curves(metrics)}
        figures |= {name: benchmark.figure(columns, scorings[name]) for name, benchmark in benchmarks.items()}
        paths = {name: save(figure, folder / f"{name}.png") for name, figure in figures.items() if figure}
    for name, path in paths.items():
        log_picture(f"report/{name}", path, loggers)
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            for column, values in scores.items():
                logger.log_metrics(dict(values), step=0 if column == "before" else record.step)
            if heads:
                logger.log_table("report/before_after", columns=["score", *scores], data=flat_rows(scores))
    console = Console(soft_wrap=True, highlight=False, markup=False)
    console.print()
    if heads:
        console.print(full_table(scores) if table == "full" else head_table(heads, columns, coverage), soft_wrap=False)
        console.print()
    for line in closing_lines(folder, record, paths, bool(heads), loggers):
        console.print(line)


def closing_lines(
    folder: Path, record: Record, pictures: Mapping[str, Path], scored: bool, loggers: Sequence[Logger]
) -> list[str]:
    """Return the lines below the scores: the files to open, the run in W&B, the time and the memory.

    Args:
        folder: The run folder.
        record: The content of results.json.
        pictures: {name: path} of the figures that were drawn.
        scored: Whether there are scores.
        loggers: Loggers of Lightning.
    """
    here = relative_path(folder)
    examples = [path.name for name, path in pictures.items() if name not in ("scores", "scores_all", "curves")]
    shown = f"{examples[0]}{' ...' if len(examples) > 1 else ''}" if examples else ""
    files = {
        "scores.txt": "every metric" if scored else "",
        "scores.png": "the lines above as a chart; scores_all.png: every metric" if "scores" in pictures else "",
        "curves.png": "losses and other logged values by step" if "curves" in pictures else "",
        shown: "example images with the answers of the model" if examples else "",
        "results.json": "the scores and their provenance",
    }
    width = max(map(len, files))
    lines = [f"Run folder: {here}", *(f"  {name.ljust(width)}  {what}" for name, what in files.items() if what)]
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            run = logger.experiment
            lines.append(f"W&B: wandb sync {here}/wandb/offline-run-*" if run.offline else f"W&B: {run.url}")
    if record.seconds is not None:
        memory = "" if record.peak_memory_gb is None else f", peak memory {record.peak_memory_gb:.1f} GB"
        lines.append(f"Time: {record.seconds:.0f} s{memory}")
    return lines


def next_command(folder: Path, record: Record) -> list[str]:
    """Return the lines that suggest the next command; none if there is nothing to suggest."""
    last = newest(Path("outputs"), 2)
    if len(last) == 2 and folder.resolve() in (path.parent.resolve() for path in last) and comparable(last):
        return ["Next: python -m clipfix run=compare", "      (compares this run with the one before it)"]
    weights = record.weights or {}
    if record.checkpoint and weights.get("before") != weights.get("after"):
        checkpoint = relative_path(folder / record.checkpoint)
        return ["Next: python -m clipfix run=export \\", f"  checkpoint={checkpoint}"]
    return []


def save(figure: Figure, path: Path) -> Path:
    """Write a figure at 150 dpi and return the path."""
    figure.savefig(path, dpi=150, bbox_inches="tight")
    return path


def log_picture(name: str, picture: Path, loggers: Sequence[Logger]) -> None:
    """Log an image file under a name to every logger that takes images."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.log_image(name, [str(picture)])


def flat_rows(scores: Mapping[str, Percentages]) -> list[list[Any]]:
    """Return one row per metric: its name, followed by its value in each column."""
    return [[name, *values] for name, values in rows(scores)]


def rows(scores: Mapping[str, Percentages]) -> list[tuple[str, list[float]]]:
    """Return (<benchmark>/<metric>, [value in each column]), in the order of the first column."""
    return [
        (name.removeprefix("eval/"), [column[name] for column in scores.values()])
        for name in next(iter(scores.values()))
    ]


def full_table(scores: Mapping[str, Percentages]) -> Table:
    """Return a table with benchmarks as sections and metrics as rows. Long names are cut where the screen is narrow."""
    shown = plain_table("Scores in percent")
    shown.add_column("benchmark")
    shown.add_column("metric")
    for column in scores:
        shown.add_column(column, justify="right", no_wrap=True)
    change = len(scores) == 2
    if change:
        shown.add_column("change", justify="right", no_wrap=True)
    last = None
    for name, values in rows(scores):
        benchmark, metric = name.split("/", 1)
        if last not in (None, benchmark):
            shown.add_section()
        cells = [f"{value:.1f}" for value in values]
        if change:
            cells.append(number(values[1] - values[0]))
        shown.add_row(one_line("" if benchmark == last else benchmark), one_line(readable(metric)), *cells)
        last = benchmark
    return shown


def bars(scores: Mapping[str, Percentages]) -> Figure | None:
    """Return a bar chart of all metrics, one panel per benchmark; None without scores."""
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
    """Return the rows of the csv logger from all starts of a run, and write them to metrics.csv.

    Where a resumed run repeats steps, the rows of the later start replace those of the earlier one.
    """
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


def prefix(name: str) -> str:
    """Return the first part of a logged name, such as `train` for `train/loss`."""
    return name.split("/", 1)[0]


def curves(metrics: list[dict[str, str]]) -> Figure | None:
    """Return curves by step of losses, notes of the method and selection scores; None without any.

    Args:
        metrics: Rows of the csv logger, as `join_metrics` returns them.
    """
    lines: dict[str, list[tuple[int, float]]] = {}
    for row in metrics:
        for name, value in row.items():
            if value and "/" in name and prefix(name) not in NOT_DRAWN:
                lines.setdefault(name, []).append((int(row["step"]), float(value)))
    if not lines:
        return None
    # train/x and val/x share a panel. So do the errors under each condition, to show differences.
    panels: dict[str, list[str]] = {}
    notes = sorted({prefix(name) for name in lines} - {*FIRST, *LAST})
    order = [*FIRST, *notes, *LAST]
    for name in sorted(lines, key=lambda name: order.index(prefix(name))):
        stage, metric = name.split("/", 1)
        shared = {"train": metric, "val": metric, "denoising": "denoising, by condition"}
        panels.setdefault(shared.get(stage, name), []).append(name)
    if sum(name.startswith("train/") for name in lines) == 2:  # with a single term, its curve is the curve of the loss
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
