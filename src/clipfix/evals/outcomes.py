"""Results of a benchmark for every item, by which two scorings can be compared item by item."""

import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any
from zipfile import BadZipFile

import numpy as np

FILE = "outcomes.npz"  # beside results.json


@dataclass(frozen=True)
class Outcome:
    """The results of one question for n items.

    Args:
        items: [n] names, equal in every scoring of the same data. Rows with the same name belong to one image or pair
            and must be resampled together.
        ranks: [n] ranks of the correct answer among all candidates; 1 is a hit.
        weights: [n] weights in the percentage; None for equal weights.
    """

    items: np.ndarray
    ranks: np.ndarray
    weights: np.ndarray | None = None

    @classmethod
    def of_answers(
        cls, items: Iterable[str], right: Iterable[bool] | np.ndarray, weights: np.ndarray | None = None
    ) -> "Outcome":
        """Return the outcome of a question with two possible results: correct (rank 1) and wrong (rank 2)."""
        return cls(np.array(list(items)), np.where(list(right), 1, 2), weights)

    def percent(self, at: int = 1) -> float:
        """Return the percentage of items whose correct answer has at most rank `at`."""
        return 100 * float(np.average(self.ranks <= at, weights=self.weights))


def class_balanced_weights(truth: np.ndarray) -> np.ndarray:
    """Return [n] weights with equal sums for all classes in `truth`; a weighted accuracy is then a mean of recalls."""
    _, classes, counts = np.unique(truth, return_inverse=True, return_counts=True)
    return 1 / counts[classes]


Outcomes = dict[str, Outcome]  # {question: results} of one scoring of one benchmark


def question(metric: str) -> tuple[str, int]:
    """Return the question of a metric, and the highest rank that is a hit: ("x", 5) for `x_R@5`, ("x", 1) for `x`."""
    name, _, at = metric.partition("_R@")
    return name, int(at or 1)


def parts(metric: str, metrics: Iterable[str], questions: Iterable[str]) -> list[tuple[str, int]]:
    """Return (question, highest rank that is a hit) of each question that a metric is the mean of.

    The list is empty for a count and for a metric without recorded outcomes. `mean` is the mean of all other metrics
    that have a question, unless there is a question named `mean`.

    Args:
        metric: The metric.
        metrics: All metrics of the benchmark.
        questions: All questions with recorded outcomes.
    """
    recorded = set(questions)
    if metric == "mean" and "mean" not in recorded:
        return [question(other) for other in metrics if question(other)[0] in recorded]
    return [question(metric)] if question(metric)[0] in recorded else []


def percent(metric: str, metrics: Iterable[str], outcomes: Outcomes) -> float | None:
    """Return a metric computed from recorded outcomes; None if it has none."""
    percentages = [outcomes[name].percent(at) for name, at in parts(metric, metrics, outcomes)]
    return fmean(percentages) if percentages else None


def save(folder: Path, columns: Sequence[str], recorded: Mapping[str, Sequence[Outcomes]]) -> None:
    """Write the outcomes of all benchmarks to one file: questions, items and weights once, and ranks for each column.

    Args:
        folder: The run folder.
        columns: Names of the scorings, such as ("before", "after").
        recorded: {benchmark: outcomes of each column}. All columns have the same questions and items.
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


def check_arrays(columns: Any, arrays: Mapping[str, np.ndarray]) -> None:
    """Raise ValueError or KeyError if arrays do not have the names, types and lengths that `save` writes."""
    if not (isinstance(columns, list) and all(isinstance(column, str) for column in columns)):
        raise ValueError("columns are not names")
    if len(set(columns)) < len(columns):
        raise ValueError("two columns have one name")
    for benchmark in dict.fromkeys(name.rpartition("/")[0] for name in arrays):
        one = {name: arrays[f"{benchmark}/{name}"] for name in ("questions", "items", "weights", "ranks")}
        rows = len(one["items"])
        if one["ranks"].shape != (len(columns), rows) or one["questions"].shape != (rows,):
            raise ValueError(f"{benchmark} has arrays of different lengths")
        if one["weights"].shape != (rows,) or one["weights"].dtype.kind not in "fiu":
            raise ValueError(f"{benchmark}/weights are not numbers, one for each item")
        if one["ranks"].dtype.kind not in "iu" or one["questions"].dtype.kind != "U":
            raise ValueError(f"{benchmark} has ranks or questions of another type")


def load(path: Path) -> dict[str, dict[str, Outcomes]]:
    """Return {column: {benchmark: outcomes}} from a file that `save` wrote.

    Raises:
        ValueError: The file is damaged, or has not the arrays that `save` writes.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = dict(stored)
        columns = arrays.pop("columns").tolist()
        check_arrays(columns, arrays)
    except (OSError, EOFError, ValueError, KeyError, AttributeError, TypeError, BadZipFile, zlib.error) as error:
        raise ValueError(
            f"{path} is not an {FILE} of run=fit or run=eval ({error!r}): fetch it again, or remove it, and there "
            "are no intervals."
        ) from error
    outcomes: dict[str, dict[str, Outcomes]] = {column: {} for column in columns}
    for benchmark in dict.fromkeys(name.rpartition("/")[0] for name in arrays):
        questions, items, weights, ranks = (
            arrays[f"{benchmark}/{name}"] for name in ("questions", "items", "weights", "ranks")
        )
        rows = {name: questions == name for name in dict.fromkeys(questions.tolist())}
        for column, column_ranks in zip(columns, ranks, strict=True):
            outcomes[column][benchmark] = {
                name: Outcome(items[row], column_ranks[row], weights[row]) for name, row in rows.items()
            }
    return outcomes
