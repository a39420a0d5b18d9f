"""Benchmarks: a model in, scores in percent out.

`evaluate` runs a set of benchmarks, named as in `conf/eval/*.yaml`. Each file of this folder holds one benchmark.
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
        values: {metric: percent}, in the order in which they are shown. `ties` is a count.
        outcomes: The answer to every item of every question; the percentages follow from them. Empty in a benchmark
            whose metrics are no shares of right answers.
        examples: What the benchmark's own `figure` shows of this scoring; None if it needs nothing.
    """

    values: dict[str, float]
    outcomes: Outcomes = field(default_factory=dict)
    examples: Any = None


class Benchmark(ABC):
    """One benchmark. A subclass writes `__init__` (bound from yaml) and `score`; it keeps nothing of a scoring."""

    def __call__(self, model: Model) -> dict[str, float]:
        """Return {metric: percent} of one model."""
        with scoring(model) as features:
            return self.score(features).values

    @abstractmethod
    def score(self, features: Features) -> Scores:
        """Return the scores of the model whose features these are."""

    def sources(self) -> dict[str, Any]:
        """Return what it reads, by argument: it is scored on `shards`; another name is what something is fitted on."""
        return {name: value for name, value in vars(self).items() if name.endswith("shards")}

    def figure(self, columns: Sequence[str], scorings: Sequence[Scores]) -> Figure | None:
        """Return pictures of what these scorings answered, or None if there is nothing to see.

        Args:
            columns: A name for each scoring, as in `("before", "after")`.
            scorings: What `score` of this benchmark returned, in the same order.
        """
        return None


def evaluate(model: Model, benchmarks: Mapping[str, Benchmark], texts: TextCache | None = None) -> dict[str, Scores]:
    """Return the scores by every benchmark, under its name; the model is left untouched.

    Shards that several benchmarks share are embedded once. Every rank embeds its share of the pictures and texts, and
    returns the same scores.

    Args:
        texts: Features of texts, kept from one call to the next for a text tower that did not change in between.
    """
    silent = rank_of()[0] > 0
    scored: dict[str, Scores] = {}
    # Not rich's `track`: an error would leave its thread behind, for which the next bar may wait for ever.
    with scoring(model, texts) as features, Progress(transient=True, disable=silent) as bar:
        task = bar.add_task("Scoring", total=len(benchmarks))
        for name, benchmark in benchmarks.items():
            scored[name] = benchmark.score(features)
            bar.advance(task)
    return scored


def percentages(scored: Mapping[str, Scores]) -> dict[str, float]:
    """Return {`eval/<benchmark>/<metric>`: percent}, the names that results.json and the loggers use."""
    return {
        f"eval/{name}/{metric}": value for name, scores in scored.items() for metric, value in scores.values.items()
    }
