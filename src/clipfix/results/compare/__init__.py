"""The comparison of runs: a table on the screen, scores.txt, figures, and report.html.

results.py    reads result files, groups runs, and checks that they can be compared
bootstrap.py  intervals of changes
rows.py       the numbers and the tables;  figures.py  the figures;  examples.py  images whose rank changed
page.py       report.html
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from clipfix.results.compare.results import PLACES, check_comparable, find, group, read
from clipfix.results.compare.rows import legend, rows, summary, summary_table, table
from clipfix.results.screen import as_text, relative_path
from clipfix.system.terminal import visible


def compare(
    folder: Path,
    seed: int,
    published: Sequence[Mapping[str, Any]],
    results: Sequence[str],
    gain: str,
    kept: str,
    resamples: int,
    coverage: float,
    examples: int,
    examples_from: str = "files",
) -> list[Path]:
    """Print a table of the main metrics, write scores.txt, figures and report.html, and return the figures' paths.

    Args:
        folder: The folder to write to.
        seed: Seed of the bootstrap.
        published: Published numbers, the entries of conf/published.yaml.
        results: Paths, run folders or globs of result files.
        gain: <benchmark>/<metric> that the method is meant to improve.
        kept: The benchmark that should not get worse.
        resamples: Number of bootstrap samples.
        coverage: Coverage of the intervals, from 0 to 1.
        examples: Number of images whose rank changed most.
        examples_from: What these are read from: `files`, also `urls`, or also `commands`.

    Raises:
        ValueError: A file is missing or no result file, or the files cannot be compared.
    """
    if examples_from not in PLACES:
        raise ValueError(f"compare.examples_from is {examples_from!r}: choose from {', '.join(PLACES)}.")
    runs = [read(path) for path in find(results)]
    notes = check_comparable(runs)
    groups = group(runs)
    all_rows = rows(groups, published, resamples, coverage, seed)
    console = Console(highlight=False, soft_wrap=True, markup=False)  # names are from files
    console.print(summary_table(groups, summary(all_rows), coverage), soft_wrap=False)
    console.print()
    for line in legend(groups, summary(all_rows)):
        console.print(line)
    if notes:
        console.print("Not checked:", style="yellow")
    for note in notes:
        console.print(f"  {note}", style="yellow")

    # Matplotlib, jinja and the reading of shards take a second to import. The table is printed before.
    from clipfix.results.compare import figures
    from clipfix.results.compare.examples import changed, picture
    from clipfix.results.compare.page import write

    folder.mkdir(parents=True, exist_ok=True)
    scores = folder / "scores.txt"
    scores.write_text(as_text(table(groups, all_rows, coverage)))
    drawn = {
        "radar": figures.radar(groups),
        "forgetting": figures.forgetting(groups, gain, kept),
        "lengths": figures.lengths(groups),
    }
    cases, reasons = changed(groups, examples, examples_from)
    if cases:
        drawn["examples"] = picture(cases)
    for reason in reasons:
        console.print(visible(reason), style="yellow")
    paths = []
    for name, figure in drawn.items():
        if figure is not None:
            paths.append(folder / f"{name}.png")
            figure.savefig(paths[-1], dpi=200)
    page = write(folder, groups, all_rows, paths, cases, [*notes, *reasons], coverage=coverage, gain=gain, kept=kept)
    console.print(f"Every metric: {relative_path(scores)}")
    console.print(f"Report: {relative_path(page)}")
    return paths
