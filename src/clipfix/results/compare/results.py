"""Result files: read, sorted into groups, and refused in one line where a comparison would not be one."""

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
IN_A_NAME = 2  # keys of a recipe; groups that differ in more are told apart by letters
# Of a benchmark's settings: where its data lie, not what they are.
WHERE = ("shards", "fit_shards", "root", "fetch", "allow_pipe")


@dataclass(frozen=True, eq=False)
class Result:
    """One results.json, and the outcomes.npz beside it. A run that only scored has nothing before."""

    path: Path
    record: Record
    before: Mapping[str, float] | None  # benchmark/metric -> percent
    after: Mapping[str, float]
    outcomes_before: Mapping[str, Outcomes] = field(default_factory=dict)  # by benchmark; empty without outcomes.npz
    outcomes_after: Mapping[str, Outcomes] = field(default_factory=dict)

    def change(self, name: str) -> float:
        """What a run changed; of a run that only scored, the score itself."""
        return self.after[name] - (self.before[name] if self.before else 0.0)

    @property
    def seed(self) -> Any:
        """Of the training; a run that only scores may have another."""
        trained = self.record.trained_with_seed
        return self.record.seed if trained is None else trained

    def data(self, benchmark: str) -> str | None:
        """What tells the data of a benchmark from others: a hash of the files, or the urls they came from."""
        found = (self.record.data or {}).get(benchmark)
        if isinstance(found, Mapping):
            found = found.get("sha256") or " ".join(found.get("urls") or [])
        return found or None

    def metrics(self, benchmark: str) -> list[str]:
        return [name.split("/", 1)[1] for name in self.after if name.split("/", 1)[0] == benchmark]


@dataclass(frozen=True, eq=False)
class Group:
    """Runs that differ only in their seed."""

    name: str
    results: Sequence[Result]
    differs: Mapping[str, Any] = field(default_factory=dict)  # keys of the recipe that a letter in the name stands for

    @property
    def seeds(self) -> list[Any]:
        return [result.seed for result in self.results]

    @property
    def amount(self) -> str:
        """How many runs, as people read it."""
        return f"{len(self.results)} seed" + "s" * (len(self.results) > 1)

    def fact(self, key: str) -> Any:
        """Of the run's identity: the same for all of its seeds."""
        return getattr(self.results[0].record, key)

    def has(self, name: str) -> bool:
        return all(name in result.after for result in self.results)


def find(entries: Sequence[str]) -> list[Path]:
    """The result files that paths, run folders and globs name, each once, in the order given."""
    found: dict[Path, None] = {}
    for entry in entries:
        paths = [Path(path) for path in sorted(glob.glob(entry, recursive=True))] or [Path(entry)]
        files = [path / FILE if path.is_dir() else path for path in paths]
        if absent := [path for path in files if not path.is_file()]:
            raise ValueError(f"There is no {absent[0]}: name results.json files or the run folders that hold them.")
        found |= dict.fromkeys(files)
    if not found:
        raise ValueError("Nothing to compare: name results, as in run=compare outputs/*/*/results.json")
    return list(found)


def newest(root: Path, number: int) -> list[Path]:
    """Return the newest result files with scores below a folder, the oldest of them first."""
    found: list[Path] = []
    for path in sorted(root.rglob(FILE), key=lambda path: path.stat().st_mtime_ns, reverse=True):
        with suppress(ValueError):  # a file of another kind
            if len(found) < number and Record.read(path).has_scores:
                found.append(path)
    return found[::-1]


def comparable(paths: Sequence[Path]) -> bool:
    """Return whether `run=compare` would show these files side by side."""
    try:
        results = [read(path) for path in paths]
        refuse(results)
        group(results)
    except ValueError:
        return False
    return True


def read(path: Path) -> Result:
    """A result file, its percentages checked against the outcomes beside it."""
    record = Record.read(path)
    columns = {
        column: {name.removeprefix("eval/"): score for name, score in scores.items()}
        for column, scores in record.scores.items()
    }
    if not columns or len(columns) > 2:
        raise ValueError(f"{path} has {len(columns)} columns of scores: one or two are compared.")
    beside = path.parent / outcomes.FILE
    recorded = outcomes.load(beside) if beside.is_file() else {}
    first, *_, last = [*columns, *columns]
    result = Result(
        path,
        record,
        columns[first] if len(columns) == 2 else None,
        columns[last],
        recorded.get(first, {}) if len(columns) == 2 else {},
        recorded.get(last, {}),
    )
    for benchmark, found in result.outcomes_after.items():
        for metric in result.metrics(benchmark):
            again = outcomes.percent(metric, result.metrics(benchmark), found)
            told = result.after[f"{benchmark}/{metric}"]
            if again is not None and abs(again - told) > 0.01:
                raise ValueError(
                    f"{beside} gives {again:.2f} for {benchmark}/{metric} where {path.name} says {told:.2f}: "
                    f"put the two files of one run beside each other, or remove {beside.name}."
                )
    return result


def refuse(results: Sequence[Result]) -> list[str]:
    """Raises where two files were scored on other data or by other settings; returns what could not be checked."""
    notes = []
    for benchmark in dict.fromkeys(name.split("/", 1)[0] for result in results for name in result.after):
        holders = [result for result in results if result.metrics(benchmark)]
        for one, other in combinations(holders, 2):
            here, there = one.data(benchmark), other.data(benchmark)
            if here and there and here != there:
                raise ValueError(
                    f"{benchmark} was scored on other data in {other.path} ({there[:12]}) than in {one.path} "
                    f"({here[:12]}): score both on the same split."
                )
            mine, theirs = settings(one, benchmark), settings(other, benchmark)
            if mine is None or theirs is None:
                continue
            if differing := [key for key in mine | theirs if mine.get(key) != theirs.get(key)]:
                key = differing[0]
                raise ValueError(
                    f"{benchmark} asks otherwise in {other.path} ({key}: {theirs.get(key)}) than in {one.path} "
                    f"({mine.get(key)}): score both by the same settings."
                )
        asked = [each for each in holders if benchmark in each.outcomes_after]
        for other in asked[1:]:
            if not same_items(asked[0].outcomes_after[benchmark], other.outcomes_after[benchmark]):
                raise ValueError(
                    f"{benchmark} asked other items in {other.path} than in {asked[0].path}: "
                    "score both on the same split."
                )
        for what, known in (
            ("data hash", [each.data(benchmark) for each in holders]),
            ("settings", [settings(each, benchmark) for each in holders]),
            ("outcomes", [each.outcomes_after.get(benchmark) for each in holders]),
        ):
            if missing := sum(one is None for one in known):
                notes.append(f"{benchmark}: no {what} in {missing} of {len(known)} files")
    return merged(notes)


def merged(notes: Sequence[str]) -> list[str]:
    """One line for what is true of several benchmarks."""
    said: dict[str, list[str]] = {}
    for note in notes:
        benchmark, _, rest = note.partition(": ")
        said.setdefault(rest, []).append(benchmark)
    return [f"{rest[0].upper()}{rest[1:]}: {', '.join(benchmarks)}." for rest, benchmarks in said.items()]


def same_items(one: Outcomes, other: Outcomes) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[name].items, other[name].items) for name in one)


def settings(result: Result, benchmark: str) -> dict[str, Any] | None:
    """How a benchmark asked, as flat keys; None in files that do not say."""
    found = (result.record.benchmarks or {}).get(benchmark)
    return None if found is None else {key: value for key, value in flat(found) if key.split(".")[-1] not in WHERE}


def flat(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of nested dicts."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield from flat(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, node


def group(results: Sequence[Result]) -> list[Group]:
    """Runs of one method, backbone, control and recipe, by seed; groups in the order of their first file.

    A group's name says no more than tells it from the others: parts of the recipe only where the rest is the same, and
    a letter where there are many of them.
    """
    families: dict[tuple[str, ...], dict[str, list[Result]]] = {}
    for result in results:
        recipe = json.dumps(result.record.recipe, sort_keys=True)
        families.setdefault(title(result.record), {}).setdefault(recipe, []).append(result)
    groups = []
    for words, recipes in families.items():
        told = [dict(flat(json.loads(recipe) or {})) for recipe in recipes]
        differing = [
            key for key in dict.fromkeys(k for one in told for k in one) if len({str(o.get(key)) for o in told}) > 1
        ]
        for letter, one, members in zip(letters(), told, recipes.values(), strict=False):
            seeded = sorted(members, key=lambda result: str(result.seed).rjust(9))
            apart = {key.removeprefix("method."): one.get(key) for key in differing}
            if len(apart) > IN_A_NAME:
                groups.append(Group(", ".join([f"{words[0]} {letter}", *words[1:]]), seeded, apart))
            else:
                groups.append(Group(", ".join([*words, *(f"{key}={value}" for key, value in apart.items())]), seeded))
    for each in groups:
        for first, second in combinations(each.results, 2):
            if first.seed == second.seed:
                raise ValueError(
                    f"{first.path} and {second.path} are both seed {first.seed} of {each.name}: leave one out."
                )
    return sorted(groups, key=lambda one: min(results.index(result) for result in one.results))


def letters() -> Iterator[str]:
    """A to Z, then AA and so on."""
    for size in count(1):
        yield from map("".join, product(ascii_uppercase, repeat=size))


def title(record: Record) -> tuple[str, ...]:
    """Return what was run, in words: method and backbone, or the model that was scored; and the control."""
    backbone = record.backbone or ""
    ran = f"{record.method} {backbone}".strip() if record.method else record.model or backbone or UNKNOWN
    return (ran, *([f"control: {record.control}"] if record.control else []))
