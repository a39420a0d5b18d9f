"""What every item of a benchmark got, beside the percentages: with it, two scorings can be compared item by item."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import numpy as np

FILE = "outcomes.npz"  # beside results.json


@dataclass(frozen=True)
class Outcome:
    """The answers to one question: the place of the right answer among all candidates, 1 is right; each array is [n].

    `items` are names that every scoring of the same data shares. What bears one name was asked of one picture or pair,
    and whoever resamples must draw it together. `weights` say what each counts in the percentage; None: all the same.
    """

    items: np.ndarray
    ranks: np.ndarray
    weights: np.ndarray | None = None

    @classmethod
    def of_answers(
        cls, items: Iterable[str], right: Iterable[bool] | np.ndarray, weights: np.ndarray | None = None
    ) -> "Outcome":
        """Of a question with no more to say than right (rank 1) or wrong (rank 2)."""
        return cls(np.array(list(items)), np.where(list(right), 1, 2), weights)

    def percent(self, at: int = 1) -> float:
        """How often the right answer is among the first `at`."""
        return 100 * float(np.average(self.ranks <= at, weights=self.weights))


def each_class_alike(truth: np.ndarray) -> np.ndarray:
    """Weights by which every class that occurs counts the same, as in a mean of recalls."""
    _, kinds, counts = np.unique(truth, return_inverse=True, return_counts=True)
    return 1 / counts[kinds]


Outcomes = dict[str, Outcome]  # of one scoring of one benchmark: question -> answers


def question(metric: str) -> tuple[str, int]:
    """What a metric asks, and which place still counts: `x_R@5` takes the first five of question `x`, `x` the first."""
    name, _, at = metric.partition("_R@")
    return name, int(at or 1)


def parts(metric: str, metrics: Iterable[str], questions: Iterable[str]) -> list[tuple[str, int]]:
    """The questions, each with its place, whose mean a metric is; none for a count, or where nothing was recorded.

    `mean` is over all other metrics that have a question, unless a question of its own bears that name.
    """
    asked = set(questions)
    if metric == "mean" and "mean" not in asked:
        return [question(other) for other in metrics if question(other)[0] in asked]
    return [question(metric)] if question(metric)[0] in asked else []


def percent(metric: str, metrics: Iterable[str], outcomes: Outcomes) -> float | None:
    """A metric computed again from what was recorded; None where nothing was."""
    found = [outcomes[name].percent(at) for name, at in parts(metric, metrics, outcomes)]
    return fmean(found) if found else None


def save(folder: Path, columns: Sequence[str], recorded: Mapping[str, Sequence[Outcomes]]) -> None:
    """One file of all benchmarks: what the scorings share (questions, items, weights) once, and the ranks of each.

    `recorded` has for each benchmark one scoring a column; every scoring asks the same of the same items.
    """
    arrays = {"columns": np.array(columns)}
    for benchmark, scorings in recorded.items():
        first = scorings[0]
        sizes = [len(outcome.ranks) for outcome in first.values()]
        weights = [np.ones(len(o.ranks)) if o.weights is None else o.weights for o in first.values()]
        ranks = [np.concatenate([outcome.ranks for outcome in scoring.values()]) for scoring in scorings]
        arrays |= {
            f"{benchmark}/questions": np.repeat(list(first), sizes),
            f"{benchmark}/items": np.concatenate([outcome.items for outcome in first.values()]),
            f"{benchmark}/weights": np.concatenate(weights),
            f"{benchmark}/ranks": np.stack(ranks).astype(np.int32),
        }
    np.savez_compressed(folder / FILE, **arrays)  # type: ignore[arg-type]


def load(path: Path) -> dict[str, dict[str, Outcomes]]:
    """What `save` wrote: column -> benchmark -> question -> answers."""
    with np.load(path, allow_pickle=False) as stored:
        arrays = dict(stored)
    columns = arrays.pop("columns").tolist()
    found: dict[str, dict[str, Outcomes]] = {column: {} for column in columns}
    for benchmark in dict.fromkeys(name.rpartition("/")[0] for name in arrays):
        questions, items, weights, ranks = (
            arrays[f"{benchmark}/{name}"] for name in ("questions", "items", "weights", "ranks")
        )
        rows = {name: questions == name for name in dict.fromkeys(questions.tolist())}
        for column, places in zip(columns, ranks, strict=True):
            found[column][benchmark] = {
                name: Outcome(items[row], places[row], weights[row]) for name, row in rows.items()
            }
    return found
