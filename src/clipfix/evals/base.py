"""The base class of benchmarks, and `evaluate`, which runs a set of benchmarks named as in `conf/eval/*.yaml`.

Each other file of this folder that defines a `Benchmark` holds one.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from matplotlib.figure import Figure
from rich.progress import Progress

from clipfix.evals.features import Features, TextCache, scoring
from clipfix.evals.outcomes import Outcomes
from clipfix.models.base import Model
from clipfix.system.ranks import rank_of


@dataclass(frozen=True)
class Scores:
    """The result of scoring one model by one benchmark.

    Args:
        values: {metric: percent}, in display order. `ties` is a count.
        outcomes: {question: result for every item}, from which the percentages are computed. Empty for a benchmark
            whose metrics are not shares of correct answers.
        examples: Data that the `figure` of the benchmark shows; None if it shows none.
    """

    values: dict[str, float]
    outcomes: Outcomes = field(default_factory=dict)
    examples: Any = None


class Benchmark(ABC):
    """Base class of benchmarks. A subclass defines `__init__`, with arguments from yaml, and a stateless `score`."""

    def __call__(self, model: Model) -> dict[str, float]:
        """Return {metric: percent} for a model."""
        with scoring(model) as features:
            return self.score(features).values

    @abstractmethod
    def score(self, features: Features) -> Scores:
        """Return the scores of the model that `features` belongs to."""

    def sources(self) -> dict[str, Any]:
        """Return {argument: data} of all arguments that name data: `shards` is scored, other data is for fitting."""
        return {name: value for name, value in vars(self).items() if name.endswith("shards")}

    def figure(self, columns: Sequence[str], scorings: Sequence[Scores]) -> Figure | None:
        """Return a figure of example answers or curves, or None if the benchmark has none.

        Args:
            columns: A name for each element of `scorings`, such as `("before", "after")`.
            scorings: Results of `score` of this benchmark, in the same order.
        """
        return None


def evaluate(model: Model, benchmarks: Mapping[str, Benchmark], texts: TextCache | None = None) -> dict[str, Scores]:
    """Return {benchmark: scores}. The model is not changed.

    Shards that several benchmarks share are embedded once. Every rank embeds a part of the images and texts and returns
    the same scores.

    Args:
        model: The model to score.
        benchmarks: The benchmarks by name.
        texts: A cache of text features that calls may share: it is keyed by a hash of the text tower.
    """
    silent = rank_of()[0] > 0
    scored: dict[str, Scores] = {}
    # After an error, rich's `track` would leave its thread running, and the next progress bar could wait for it.
    with scoring(model, texts) as features, Progress(transient=True, disable=silent) as bar:
        task = bar.add_task("Scoring", total=len(benchmarks))
        for name, benchmark in benchmarks.items():
            scored[name] = benchmark.score(features)
            bar.advance(task)
    return scored


def percentages(scored: Mapping[str, Scores]) -> dict[str, float]:
    """Return {`eval/<benchmark>/<metric>`: percent}, with the names that results.json and the loggers use."""
    return {
        f"eval/{name}/{metric}": value for name, scores in scored.items() for metric, value in scores.values.items()
    }
