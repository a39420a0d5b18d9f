"""README's table of methods from benchmarks/results: `make tables` rewrites the text between two comments.

    <!-- table: methods (make tables) -->

    ...

    <!-- end -->

Words come from tables.yaml, numbers from result files.
"""

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from clipfix.results.compare.results import Group, Result, check_comparable, find, group, read
from clipfix.results.compare.rows import summarize

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
BLOCK = re.compile(r"(<!-- table: methods \(make tables\) -->\n).*?(<!-- end -->)", re.DOTALL)


def methods(wanted: Mapping[str, Any], results: Path) -> str:
    """Return the table in markdown: a row per method, with mean and standard deviation over seeds of each change."""
    groups = [None if row["results"] is None else one(results, row["results"]) for row in wanted["rows"]]
    runs = [result for each in groups if each is not None for result in each.results]
    check_comparable(runs)  # scores of different splits do not belong in one table
    heads = [f"{name} {before(runs, metric):.0f}" for name, metric in wanted["columns"].items()]
    lines = [["method", "what it does", *heads, "minutes", "source"], ["---"] * (len(heads) + 4)]
    for row, each in zip(wanted["rows"], groups, strict=True):
        changes = [change(each, metric) if each else "" for metric in wanted["columns"].values()]
        link = f"[{row['source']}](https://arxiv.org/abs/{row['source']})" if row["source"] else ""
        lines.append([row["name"], row["does"], *changes, minutes(row, each), link])
    lines = [[cell if cell == "---" else f" {cell} " if cell else " " for cell in line] for line in lines]
    return "\n".join(f"|{'|'.join(line)}|" for line in lines)


def one(results: Path, pattern: str) -> Group:
    """Return the runs of one recipe.

    Raises:
        ValueError: The pattern names runs of several recipes.
    """
    groups = group([read(path) for path in find([str(results / pattern)])])
    if len(groups) > 1:
        raise ValueError(f"{pattern} holds {len(groups)} recipes: {', '.join(each.name for each in groups)}.")
    return groups[0]


def before(runs: Sequence[Result], metric: str) -> float:
    return fmean(result.before[metric] for result in runs if result.before is not None)


def change(each: Group, metric: str) -> str:
    mean, sd = summarize([result.change(metric) for result in each.results])
    return f"{round(mean, 1) + 0.0:+.1f}" + ("" if sd is None else f" ± {sd:.1f}")  # no -0.0


def minutes(row: Mapping[str, Any], each: Group | None) -> str:
    """Return what a run costs: as the row says, else as the result files say."""
    if "minutes" in row or each is None:
        return str(row.get("minutes") or "")
    return f"{fmean(result.record.seconds or 0 for result in each.results) / 60:.0f}"


def rewritten(text: str, table: str) -> str:
    """Return the text with a new table between the comments."""
    if len(BLOCK.findall(text)) != 1:
        raise ValueError("README.md must have one place for the table of methods, between two comments.")
    return BLOCK.sub(lambda found: f"{found[1]}\n{table}\n\n{found[2]}", text)


def main() -> None:
    table = methods(yaml.safe_load((HERE / "tables.yaml").read_text()), HERE / "results")
    README.write_text(rewritten(README.read_text(), table))


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"make tables: {error}")
