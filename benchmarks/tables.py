"""Writes the tables of README.md from benchmarks/results: `make tables` replaces the text between two comments.

    <!-- table: methods (make tables) -->

    ...

    <!-- end -->

Text comes from tables.yaml, and numbers from result files alone.
"""

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from clipfix.results.compare.results import Group, Result, find, group, read, refuse
from clipfix.results.compare.rows import number, summarize

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
BLOCK = re.compile(r"(<!-- table: (\w+) \(make tables\) -->\n).*?(<!-- end -->)", re.DOTALL)


def render(wanted: Mapping[str, Any], results: Path) -> dict[str, str]:
    """Return every table by name, in Markdown."""
    return {"methods": methods(wanted["methods"], results), "run": run(wanted["run"], results)}


def methods(wanted: Mapping[str, Any], results: Path) -> str:
    """Return a row for each method with the change of each metric: mean and standard deviation over seeds."""
    groups = [None if row["results"] is None else one(results, row["results"]) for row in wanted["rows"]]
    runs = [result for each in groups if each is not None for result in each.results]
    refuse(runs)  # raises if runs were scored on different splits
    heads = [f"{name} {before(runs, metric):.0f}" for name, metric in wanted["columns"].items()]
    lines = [["method", "what it does", *heads, "source"], ["---"] * (len(heads) + 3)]
    for row, each in zip(wanted["rows"], groups, strict=True):
        changes = [change(each, metric) if each else "" for metric in wanted["columns"].values()]
        link = f"[{row['source']}](https://arxiv.org/abs/{row['source']})" if row["source"] else ""
        lines.append([row["name"], row["does"], *changes, link])
    lines = [[cell if cell == "---" else f" {cell} " if cell else " " for cell in line] for line in lines]
    return "\n".join(f"|{'|'.join(line)}|" for line in lines)


def one(results: Path, pattern: str) -> Group:
    """Return the runs of one recipe, with all seeds; raise ValueError if there are several recipes."""
    groups = group([read(path) for path in find([str(results / pattern)])])
    if len(groups) > 1:
        raise ValueError(f"{pattern} matches {len(groups)} recipes: {', '.join(each.name for each in groups)}.")
    return groups[0]


def before(runs: Sequence[Result], metric: str) -> float:
    """Return the mean score before training."""
    return fmean(result.before[metric] for result in runs if result.before is not None)


def change(each: Group, metric: str) -> str:
    """Return the change of a metric as text."""
    mean, sd = summarize([result.change(metric) for result in each.results])
    return f"{round(mean, 1) + 0.0:+.1f}" + ("" if sd is None else f" ± {sd:.1f}")  # + 0.0 avoids -0.0


def run(wanted: Mapping[str, Any], results: Path) -> str:
    """Return some lines of the table of a run, as the terminal shows them."""
    (result,) = one(results, wanted["results"]).results
    assert result.before is not None
    lines: list[list[str] | None] = []
    last = None
    for name in wanted["lines"]:
        if name == "...":
            lines.append(None)
            continue
        benchmark, metric = name.split("/")
        values = [f"{result.before[name]:.1f}", f"{result.after[name]:.1f}", number(result.change(name))]
        lines.append(["" if benchmark == last else benchmark, metric.replace("_", " "), *values])
        last = benchmark
    head = ["benchmark", "metric", "before", "after", "change"]
    widths = [max(len(line[i]) for line in [head, *filter(None, lines)]) for i in range(len(head))]

    def formatted(line: list[str] | None) -> str:
        if line is None:
            return "   ..."
        cells = [
            cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        ]
        return "│ " + " │ ".join(cells) + " │"

    return "\n".join(["```", *(formatted(line) for line in [head, *lines]), "```"])


def rewritten(text: str, tables: Mapping[str, str]) -> str:
    """Return the text with every table replaced."""
    names = [name for _, name, _ in BLOCK.findall(text)]
    if sorted(names) != sorted(tables):
        raise ValueError(f"README.md has comments for the tables {names}, but the tables are {list(tables)}.")
    return BLOCK.sub(lambda match: f"{match[1]}\n{tables[match[2]]}\n\n{match[3]}", text)


def main() -> None:
    tables = render(yaml.safe_load((HERE / "tables.yaml").read_text()), HERE / "results")
    README.write_text(rewritten(README.read_text(), tables))


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"make tables: {error}")
