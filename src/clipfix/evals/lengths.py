"""How far a model reads: retrieval when only the beginning of each caption is there."""

from collections.abc import Mapping, Sequence
from random import Random
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from clipfix.data.texts import Text
from clipfix.evals.base import Benchmark, Scores
from clipfix.evals.features import Features
from clipfix.evals.outcomes import Outcome
from clipfix.evals.plots import AFTER, BEFORE
from clipfix.evals.retrieval import both_ways


class Lengths(Benchmark):
    """R@1, mean of both ways, with captions cut after so many tokens, start and end token among them.

    The same pictures and captions at every length, so the curve rises as long as the model makes use of more words. It
    is flat from the model's context on, and CLIP's is often flat before that.

    Source: Long-CLIP (arXiv 2403.15378), section 2, measures the length that CLIP really reads in this way.
    """

    def __init__(
        self,
        shards: str | Sequence[str] | None,
        text: Mapping[str, Any],
        tokens: Sequence[int],
        allow_pipe: bool = False,
    ) -> None:
        self.shards, self.text, self.tokens, self.allow_pipe = shards, Text(**text), sorted(tokens), allow_pipe
        if not self.tokens or self.tokens[0] < 3:
            raise ValueError(f"eval: tokens {list(tokens)}: give lengths of 3 or more, as start and end count.")

    def score(self, features: Features) -> Scores:
        images, kept = features.images(self.shards, self.allow_pipe)
        captions = [caption for sample in kept for caption in self.text.draw(sample, Random(sample["key"]))]
        outcomes = {}
        for length in self.tokens:
            ways = both_ways([sample["key"] for sample in kept], images, features.texts(captions, at_most=length))
            asked = list(ways.values())
            outcomes[f"{length}_tokens"] = Outcome(
                np.concatenate([way.items for way in asked]),
                np.concatenate([way.ranks for way in asked]),
                np.concatenate([np.full(len(way.ranks), 1 / len(way.ranks)) for way in asked]),  # a way counts half
            )
        return Scores({f"{name}_R@1": outcome.percent() for name, outcome in outcomes.items()}, outcomes)

    def figure(self, columns: Sequence[str], scorings: Sequence[Scores]) -> Figure | None:
        """Return a chart with one line for each scoring."""
        figure = Figure(figsize=(6, 3.6), layout="constrained")
        axis = figure.subplots()
        for name, scoring, colour in zip(columns, scorings, (BEFORE, AFTER), strict=False):
            axis.plot(self.tokens, list(scoring.values.values()), color=colour, marker="o", linewidth=2, label=name)
        axis.set(xlabel="tokens of each caption that are read", ylabel="R@1, percent", xticks=self.tokens)
        axis.set_ylim(bottom=0)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False)
        return figure
