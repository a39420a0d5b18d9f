"""MMVP-VLM: pairs of similar images that differ in one respect, with a statement about each."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

import torch
from jaxtyping import Bool, Float
from matplotlib.figure import Figure
from torch import Tensor

from clipfix.evals.base import Benchmark, Scores
from clipfix.evals.embed import PatchPooling, Sample, Shards, pictures
from clipfix.evals.features import Features
from clipfix.evals.outcomes import Outcome
from clipfix.evals.plots import Cell, gallery


def picks(
    images: Float[Tensor, "p 2 d"], texts: Float[Tensor, "p 2 d"]
) -> tuple[Bool[Tensor, " p"], Bool[Tensor, "p 2"]]:
    """Return [p] whether both texts of a pair are more similar to their own image, and [p, 2] whether a text has a tie.

    A tie counts as wrong: if the order of the images decided ties, a model without information would score.
    Source: Tong et al. 2024 (arXiv 2401.06209), MMVP-VLM.
    Departs: MMVP's script compares half-precision softmax values with 0.5; fp32 similarities differ only in ties.
    """
    # With a matmul, identical images could have different scores on some devices.
    scores = (texts[:, :, None] * images[:, None, :]).sum(-1)  # pair, text, image
    own, other = scores.diagonal(dim1=1, dim2=2), scores.flip(2).diagonal(dim1=1, dim2=2)
    return (own > other).all(dim=1), own == other


class Pairs(Benchmark):
    """Share of pairs whose two statements are both most similar to their own image, by pattern. Chance is 25.

    `mean` is the mean over patterns, so that patterns with more pairs do not weigh more. `ties` is the number of texts
    with a tie. Source: see `picks`.

    Args:
        shards: The data. The json of a sample has `pair`, `pattern` and `statement`.
        prefix: Text in front of every statement.
        local: Arguments of `PatchPooling`, to embed images as in DIVA's code; None for the plain embedding.
    """

    def __init__(self, shards: Shards, prefix: str, local: Mapping[str, Any] | None = None) -> None:
        self.shards, self.prefix = shards, prefix
        self.pooling = PatchPooling(**local) if local is not None else None

    def score(self, features: Features) -> Scores:
        images, samples = features.images(self.shards, pooling=self.pooling)
        pairs = self.rows(samples)
        order = torch.tensor(list(pairs.values()))
        texts = features.texts([self.prefix + sample["json"]["statement"] for sample in samples])
        right, tied = picks(images[order], texts[order])
        by_pattern: dict[str, dict[str, bool]] = defaultdict(dict)
        for (number, (first, _)), answer in zip(pairs.items(), right.tolist(), strict=True):
            by_pattern[samples[first]["json"]["pattern"].lower().replace(" ", "_")][str(number)] = answer
        outcomes = {pattern: Outcome.of_answers(answers, answers.values()) for pattern, answers in by_pattern.items()}
        shares = {pattern: outcome.percent() for pattern, outcome in outcomes.items()}
        return Scores({"mean": fmean(shares.values()), **shares, "ties": float(tied.sum())}, outcomes)

    def figure(self, columns: Sequence[str], scorings: Sequence[Scores]) -> Figure | None:
        """Return one pair per pattern, if possible one whose result changed; None if `local` is set."""
        if self.pooling is not None:
            return None
        answers = [
            {
                int(number): bool(rank == 1)
                for one in scoring.outcomes.values()
                for number, rank in zip(one.items, one.ranks, strict=True)
            }
            for scoring in scorings
        ]
        by_pattern: dict[str, list[tuple[bool, int, list[Sample]]]] = defaultdict(list)
        samples = list(pictures(self.shards))
        for number, rows in self.rows(samples).items():
            pair = [samples[row] for row in rows]
            changed = len({answer[number] for answer in answers}) > 1
            by_pattern[pair[0]["json"]["pattern"]].append((not changed, number, pair))
        cells = []
        for pattern, candidates in by_pattern.items():
            _, number, (first, second) = min(candidates, key=lambda candidate: candidate[:2])
            verdicts = [
                (f"{column}: {'correct' if answer[number] else 'wrong'}", answer[number])
                for column, answer in zip(columns, answers, strict=True)
            ]
            cells.append(Cell(first["image"], pattern, [(first["json"]["statement"], None), *verdicts]))
            cells.append(Cell(second["image"], "", [(second["json"]["statement"], None)]))
        return gallery(cells, across=6)

    def rows(self, samples: Iterable[Sample]) -> dict[int, list[int]]:
        """Return {pair: the rows of its two samples}."""
        pairs: dict[int, list[int]] = defaultdict(list)
        for row, sample in enumerate(samples):
            pairs[sample["json"]["pair"]].append(row)
        if incomplete := sum(len(pair) != 2 for pair in pairs.values()):
            raise ValueError(f"{incomplete} pairs in {self.shards} do not have two images: write these shards again.")
        return pairs
