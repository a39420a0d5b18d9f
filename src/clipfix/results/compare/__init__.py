"""Results of runs side by side: a table on screen, pictures, and a page that opens anywhere.

results.py    result files, read, grouped, and refused where they do not compare;  bootstrap.py  how sure a change is
rows.py       the numbers and the table;  figures.py  the pictures;  examples.py  pictures whose rank changed
page.py       report.html
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from clipfix.results.compare.results import find, group, read, refuse
from clipfix.results.compare.rows import by_group, rows, summary, table


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
) -> list[Path]:
    """Prints the table, then leaves pictures and report.html in the folder; returns the pictures.

    `gain` is the metric that the repair is for, `kept` the benchmark that must not suffer.
    """
    runs = [read(path) for path in find(results)]
    notes = refuse(runs)
    groups = group(runs)
    found = rows(groups, published, resamples, coverage, seed)
    console = Console() if Console().is_terminal else Console(width=160)  # a log has room
    short = len(groups) > 2  # more have no room side by side
    console.print(by_group(groups, summary(found), coverage) if short else table(groups, found, coverage))
    for each in groups:
        if each.differs:
            said = ", ".join(f"{key}={value}" for key, value in each.differs.items())
            console.print(f"[bold]{each.name}[/]: {escape(said)}", highlight=False)
    if short:
        console.print("Every metric is in report.html.")
    for note in notes:
        console.print(f"Not checked or not known. {note}", style="yellow", highlight=False)

    # Matplotlib and jinja take a second, and shards are read by torch's libraries: the table does not wait for them.
    from clipfix.results.compare import figures
    from clipfix.results.compare.examples import changed, picture
    from clipfix.results.compare.page import write

    folder.mkdir(parents=True, exist_ok=True)
    drawn = {
        "radar": figures.radar(groups),
        "forgetting": figures.forgetting(groups, gain, kept),
        "lengths": figures.lengths(groups),
    }
    cases, missed = changed(groups, examples)
    if cases:
        drawn["examples"] = picture(cases)
    for note in missed:
        console.print(note, style="yellow", highlight=False)
    paths = []
    for name, figure in drawn.items():
        if figure is not None:
            paths.append(folder / f"{name}.png")
            figure.savefig(paths[-1], dpi=200)
    page = write(folder, groups, found, paths, cases, [*notes, *missed], coverage=coverage, gain=gain, kept=kept)
    console.print(f"Report: {page}", soft_wrap=True)
    return paths
