"""Benchmarks: a backbone in, {name: percent} out.

`evaluate` runs a keyed set of them as `conf/eval/*.yaml` lists it. Each file holds one benchmark.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from rich.progress import Progress

from clipfix.evals.features import Features, TextCache, scoring
from clipfix.evals.outcomes import Outcomes
from clipfix.models.clip import Backbone
from clipfix.system.ranks import rank_of


class Benchmark(ABC):
    """One yardstick. A subclass writes `__init__` (bound from yaml) and `score`.

    Each scoring leaves in `outcomes` what every item got, from which its percentages can be computed again.
    """

    outcomes: Sequence[Outcomes] = ()  # per scoring; a list of its own in a benchmark that records

    def __call__(self, backbone: Backbone) -> dict[str, float]:
        with scoring(backbone) as features:
            return self.score(features)

    @abstractmethod
    def score(self, features: Features) -> dict[str, float]:
        """Metrics by name, in percent, from the features of a backbone."""

    def sources(self) -> dict[str, Any]:
        """What it reads, by argument: `shards` is what it is scored on, another one what something is fitted on."""
        return {name: value for name, value in vars(self).items() if name.endswith("shards")}

    def figure(self, columns: Sequence[str]) -> Figure | None:
        """Pictures that show what the last scorings answered, one column each; None where there is nothing to see."""
        return None


def evaluate(
    backbone: Backbone, benchmarks: Mapping[str, Benchmark], texts: TextCache | None = None
) -> dict[str, float]:
    """`eval/<benchmark>/<metric>` of every benchmark, each shard set embedded once; the backbone is left untouched.

    Every rank that takes part gets the same scores, and embeds its share of the pictures and texts.
    `texts` holds the features of texts from one call to the next, for a text tower that did not change in between.
    """
    silent = rank_of()[0] > 0
    scores: dict[str, float] = {}
    # Not rich's `track`: an error would leave its thread behind, for which the next bar may wait for ever.
    with scoring(backbone, texts) as features, Progress(transient=True, disable=silent) as bar:
        task = bar.add_task("Scoring", total=len(benchmarks))
        for name, benchmark in benchmarks.items():
            scores |= {f"eval/{name}/{metric}": value for metric, value in benchmark.score(features).items()}
            bar.advance(task)
    return scores
