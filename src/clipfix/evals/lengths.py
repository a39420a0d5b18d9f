"""Retrieval with truncated captions, which measures how much of a long caption a model uses."""

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
from clipfix.evals.retrieval import retrieval_ranks


class Lengths(Benchmark):
    """R@1 as the mean of both directions, with captions truncated to each of several lengths.

    Images and captions are the same at every length, so the curve rises while the model uses additional words. It is
    flat beyond the context length of the model; CLIP's curve is often flat earlier.

    Source: Long-CLIP (arXiv 2403.15378), section 2, measures the effective length of CLIP in this way.

    Args:
        shards: The data.
        text: The captions, as in `Retrieval`.
        tokens: Lengths in tokens, including start and end token; 3 or more.
        allow_pipe: Whether urls may run commands.
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
            raise ValueError(
                f"eval: tokens is {list(tokens)}: set lengths of 3 or more, since start and end token count."
            )

    def score(self, features: Features) -> Scores:
        images, samples = features.images(self.shards, self.allow_pipe)
        captions = [caption for sample in samples for caption in self.text.draw(sample, Random(sample["key"]))]
        outcomes = {}
        for length in self.tokens:
            ways = retrieval_ranks(
                [sample["key"] for sample in samples], images, features.texts(captions, at_most=length)
            )
            directions = list(ways.values())
            outcomes[f"{length}_tokens"] = Outcome(
                np.concatenate([way.items for way in directions]),
                np.concatenate([way.ranks for way in directions]),
                np.concatenate(
                    [np.full(len(way.ranks), 1 / len(way.ranks)) for way in directions]
                ),  # each has half the weight
            )
        return Scores({f"{name}_R@1": outcome.percent() for name, outcome in outcomes.items()}, outcomes)

    def figure(self, columns: Sequence[str], scorings: Sequence[Scores]) -> Figure | None:
        """Return a chart with one curve per column."""
        figure = Figure(figsize=(6, 3.6), layout="constrained")
        axis = figure.subplots()
        for name, scoring, colour in zip(columns, scorings, (BEFORE, AFTER), strict=False):
            axis.plot(self.tokens, list(scoring.values.values()), color=colour, marker="o", linewidth=2, label=name)
        axis.set(xlabel="caption length, tokens", ylabel="R@1, percent", xticks=self.tokens)
        axis.set_ylim(bottom=0)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False)
        return figure
