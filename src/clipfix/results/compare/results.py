"""Reads result files, groups runs that differ by seed, and checks that files can be compared."""

import glob
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import combinations, count, product
from pathlib import Path
from string import ascii_uppercase
from typing import Any

import numpy as np

from clipfix.evals import outcomes
from clipfix.evals.outcomes import Outcomes
from clipfix.results.record import FILE, Record

UNKNOWN = "unknown"
IN_A_NAME = 2  # keys of a recipe in the name of a group; groups that differ in more get letters
# Settings of a benchmark that locate its data, and may differ between machines.
LOCATIONS = ("shards", "fit_shards", "root", "fetch", "allow_pipe")

# What images of examples may be read from; each includes those before it. The settings of this run decide, not a file.
PLACES = ("files", "urls", "commands")


@dataclass(frozen=True, eq=False)
class Result:
    """One results.json with the outcomes.npz in the same folder.

    Args:
        path: Path of results.json.
        record: Its content.
        before: {<benchmark>/<metric>: percent} before training; None for a run of `run=eval`.
        after: The same after training.
        outcomes_before: {benchmark: outcomes}; empty without outcomes.npz.
        outcomes_after: The same after training.
    """

    path: Path
    record: Record
    before: Mapping[str, float] | None
    after: Mapping[str, float]
    outcomes_before: Mapping[str, Outcomes] = field(default_factory=dict)
    outcomes_after: Mapping[str, Outcomes] = field(default_factory=dict)

    def change(self, name: str) -> float:
        """Return the change of a metric in points; for a run without scores before, the score."""
        return self.after[name] - (self.before[name] if self.before else 0.0)

    @property
    def seed(self) -> Any:
        """The seed of the training run; of this run if it is unknown."""
        trained = self.record.trained_with_seed
        return self.record.seed if trained is None else trained

    def data(self, benchmark: str) -> str | None:
        """Return the hash of the data of a benchmark, or its urls; None if neither is recorded."""
        data = (self.record.data or {}).get(benchmark)
        if isinstance(data, Mapping):
            data = data.get("sha256") or " ".join(data.get("urls") or [])
        return data or None

    def metrics(self, benchmark: str) -> list[str]:
        """Return the metrics of a benchmark."""
        return [name.split("/", 1)[1] for name in self.after if name.split("/", 1)[0] == benchmark]


@dataclass(frozen=True, eq=False)
class Group:
    """Runs that differ only in their seed.

    Args:
        name: Name of the group, in which it differs from the other groups.
        results: The runs, by seed.
        differs: The settings that a letter in the name replaces.
    """

    name: str
    results: Sequence[Result]
    differs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def seeds(self) -> list[Any]:
        """The seed of each run."""
        return [result.seed for result in self.results]

    @property
    def amount(self) -> str:
        """The number of runs as text."""
        return f"{len(self.results)} seed" + "s" * (len(self.results) > 1)

    def fact(self, key: str) -> Any:
        """Return a field of the record that is the same for all runs of the group."""
        return getattr(self.results[0].record, key)

    def has(self, name: str) -> bool:
        """Return whether all runs have a metric, given as <benchmark>/<metric>."""
        return all(name in result.after for result in self.results)


def find(entries: Sequence[str]) -> list[Path]:
    """Return the result files that paths, run folders and globs name, in this order, each once.

    Raises:
        ValueError: A file does not exist, or there are no entries.
    """
    unique: dict[Path, None] = {}
    for entry in entries:
        paths = [Path(path) for path in sorted(glob.glob(entry, recursive=True))] or [Path(entry)]
        files = [path / FILE if path.is_dir() else path for path in paths]
        if absent := [path for path in files if not path.is_file()]:
            raise ValueError(
                f"compare.results: {absent[0]} does not exist. Give results.json files or run folders that contain one."
            )
        unique |= dict.fromkeys(files)
    if not unique:
        raise ValueError("compare.results is empty: give result files, as in run=compare outputs/*/*/results.json")
    return list(unique)


def newest(root: Path, number: int) -> list[Path]:
    """Return the newest `number` result files with scores below a folder, sorted from old to new."""
    files: list[Path] = []
    for path in sorted(root.rglob(FILE), key=lambda path: path.stat().st_mtime_ns, reverse=True):
        with suppress(ValueError):  # a results.json of another program
            if len(files) < number and Record.read(path).has_scores:
                files.append(path)
    return files[::-1]


def comparable(paths: Sequence[Path]) -> bool:
    """Return whether `run=compare` accepts these files."""
    try:
        results = [read(path) for path in paths]
        check_comparable(results)
        group(results)
    except ValueError:
        return False
    return True


def read(path: Path) -> Result:
    """Return a result file with its outcomes, after a check that its percentages agree with them.

    Raises:
        ValueError: It is not a result file, or does not agree with the outcomes.npz in its folder.
    """
    record = Record.read(path)
    columns = {
        column: {name.removeprefix("eval/"): score for name, score in scores.items()}
        for column, scores in record.scores.items()
    }
    if not columns or len(columns) > 2:
        raise ValueError(f"{path} has {len(columns)} columns of scores: files with one or two can be compared.")
    if not record.has_scores:
        raise ValueError(f"{path} has no scores, as a run with eval=none: choose another file.")
    first, *_, last = [*columns, *columns]
    if differing := columns[first].keys() ^ columns[last].keys():
        raise ValueError(f"{path} has {min(differing)} in one of its columns alone: choose another file.")
    items = path.parent / outcomes.FILE
    recorded = outcomes.load(items) if items.is_file() else {}
    if recorded and (absent := columns.keys() - recorded.keys()):
        raise ValueError(
            f"{items} has no column {min(absent)}, and {path.name} has one: put the two files of the same run into one "
            f"folder, or remove {items.name}."
        )
    result = Result(
        path,
        record,
        columns[first] if len(columns) == 2 else None,
        columns[last],
        recorded.get(first, {}) if len(columns) == 2 else {},
        recorded.get(last, {}),
    )
    for benchmark, of_benchmark in result.outcomes_after.items():
        for metric in result.metrics(benchmark):
            computed = outcomes.percent(metric, result.metrics(benchmark), of_benchmark)
            stored = result.after[f"{benchmark}/{metric}"]
            if computed is not None and abs(computed - stored) > 0.01:
                raise ValueError(
                    f"{items} gives {computed:.2f} for {benchmark}/{metric}, but {path.name} gives {stored:.2f}: "
                    f"put the two files of the same run into one folder, or remove {items.name}."
                )
    return result


def check_comparable(results: Sequence[Result]) -> list[str]:
    """Check that every benchmark has the same data and settings in all files; return notes on what is not recorded.

    Raises:
        ValueError: The data, settings or items of a benchmark differ between two files.
    """
    notes = []
    for benchmark in dict.fromkeys(name.split("/", 1)[0] for result in results for name in result.after):
        holders = [result for result in results if result.metrics(benchmark)]
        for one, other in combinations(holders, 2):
            here, there = one.data(benchmark), other.data(benchmark)
            if here and there and here != there:
                raise ValueError(
                    f"{benchmark} was scored on different data in {other.path} ({there[:12]}) and {one.path} "
                    f"({here[:12]}): score both on the same split."
                )
            mine, theirs = settings(one, benchmark), settings(other, benchmark)
            if mine is None or theirs is None:
                continue
            if differing := [key for key in mine | theirs if mine.get(key) != theirs.get(key)]:
                key = differing[0]
                raise ValueError(
                    f"{benchmark} has different settings in {other.path} ({key}: {theirs.get(key)}) and {one.path} "
                    f"({key}: {mine.get(key)}): score both with the same settings."
                )
        with_items = [each for each in holders if benchmark in each.outcomes_after]
        for other in with_items[1:]:
            if not same_items(with_items[0].outcomes_after[benchmark], other.outcomes_after[benchmark]):
                raise ValueError(
                    f"{benchmark} has different items in {other.path} and {with_items[0].path}: "
                    "score both on the same split."
                )
        for what, values in (
            ("data hash", [each.data(benchmark) for each in holders]),
            ("settings", [settings(each, benchmark) for each in holders]),
            ("outcomes", [each.outcomes_after.get(benchmark) for each in holders]),
        ):
            if missing := sum(value is None for value in values):
                notes.append(f"{benchmark}: no {what} in {missing} of {len(values)} files")
    return merge_notes(notes)


def merge_notes(notes: Sequence[str]) -> list[str]:
    """Return the notes, with those that are equal for several benchmarks joined to one."""
    benchmarks: dict[str, list[str]] = {}
    for note in notes:
        benchmark, _, rest = note.partition(": ")
        benchmarks.setdefault(rest, []).append(benchmark)
    return [f"{rest[0].upper()}{rest[1:]}: {', '.join(names)}." for rest, names in benchmarks.items()]


def same_items(one: Outcomes, other: Outcomes) -> bool:
    """Return whether two scorings have the same questions and items."""
    return one.keys() == other.keys() and all(np.array_equal(one[name].items, other[name].items) for name in one)


def settings(result: Result, benchmark: str) -> dict[str, Any] | None:
    """Return {dotted key: value} of the settings of a benchmark, without locations; None if they are not recorded."""
    nested = (result.record.benchmarks or {}).get(benchmark)
    return (
        None
        if nested is None
        else {key: value for key, value in flatten(nested) if key.split(".")[-1] not in LOCATIONS}
    )


def flatten(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of nested dicts."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield from flatten(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, node


def group(results: Sequence[Result]) -> list[Group]:
    """Return groups of runs with equal method, backbone, control and recipe, in the order of their first file.

    The name of a group has method, backbone and control. Groups for which these are equal also have the settings in
    which their recipes differ, or a letter if these are many.

    Raises:
        ValueError: Two files of a group have the same seed.
    """
    families: dict[tuple[str, ...], dict[str, list[Result]]] = {}
    for result in results:
        recipe = json.dumps(result.record.recipe, sort_keys=True)
        families.setdefault(title(result.record), {}).setdefault(recipe, []).append(result)
    groups = []
    for words, recipes in families.items():
        configs = [dict(flatten(json.loads(recipe) or {})) for recipe in recipes]
        keys = dict.fromkeys(key for config in configs for key in config)
        differing = [key for key in keys if len({str(config.get(key)) for config in configs}) > 1]
        for letter, config, members in zip(letters(), configs, recipes.values(), strict=False):
            by_seed = sorted(members, key=lambda result: str(result.seed).rjust(9))
            differs = {key.removeprefix("method."): config.get(key) for key in differing}
            if len(differs) > IN_A_NAME:
                groups.append(Group(", ".join([f"{words[0]} {letter}", *words[1:]]), by_seed, differs))
            else:
                name = ", ".join([*words, *(f"{key}={value}" for key, value in differs.items())])
                groups.append(Group(name, by_seed))
    for each in groups:
        for first, second in combinations(each.results, 2):
            if first.seed == second.seed:
                raise ValueError(
                    f"{first.path} and {second.path} are both seed {first.seed} of {each.name}: remove one of them."
                )
    return sorted(groups, key=lambda one: min(results.index(result) for result in one.results))


def letters() -> Iterator[str]:
    """Yield A to Z, then AA, AB and so on."""
    for size in count(1):
        yield from map("".join, product(ascii_uppercase, repeat=size))


def title(record: Record) -> tuple[str, ...]:
    """Return the parts of a group's name: method and backbone, or the scored model, and the control if there is one."""
    backbone = record.backbone or ""
    name = f"{record.method} {backbone}".strip() if record.method else record.model or backbone or UNKNOWN
    return (name, *([f"control: {record.control}"] if record.control else []))
