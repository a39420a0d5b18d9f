"""Look-alike pairs: two pictures that differ in one thing, and a statement for each."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

import torch
from jaxtyping import Bool, Float
from matplotlib.figure import Figure
from torch import Tensor

from clipfix.evals.base import Benchmark, Scores
from clipfix.evals.embed import Local, Sample, Shards, pictures
from clipfix.evals.features import Features
from clipfix.evals.outcomes import Outcome
from clipfix.evals.plots import Cell, gallery


def picks(
    images: Float[Tensor, "p 2 d"], texts: Float[Tensor, "p 2 d"]
) -> tuple[Bool[Tensor, " p"], Bool[Tensor, "p 2"]]:
    """Pairs whose two texts each pick their own image, and the texts that cannot tell the two images apart.

    A tie is not a pick: broken by the order of the images, it would hand out points for nothing.
    Source: Tong et al. 2024 (arXiv 2401.06209), MMVP-VLM.
    Departs: MMVP's script compares half-precision softmax values with 0.5; exact fp32 similarities differ only in ties.
    """
    # A product and a sum instead of a matmul: bit-equal images then have bit-equal scores on every device.
    scores = (texts[:, :, None] * images[:, None, :]).sum(-1)  # pair, text, image
    own, other = scores.diagonal(dim1=1, dim2=2), scores.flip(2).diagonal(dim1=1, dim2=2)
    return (own > other).all(dim=1), own == other


class Pairs(Benchmark):
    """MMVP-VLM's rule on shards whose records carry `pair`, `pattern` and `statement`.

    `mean` is over patterns, so that no pattern counts more for having more pairs; `ties` counts texts, chance is 25.
    With `local` (`tokens`, `normalized`, `seed`: see `Local`) a picture is embedded as DIVA's code does for this score.
    """

    def __init__(self, shards: Shards, prefix: str, local: Mapping[str, Any] | None = None) -> None:
        self.shards, self.prefix = shards, prefix
        self.local = Local(**local) if local is not None else None

    def score(self, features: Features) -> Scores:
        images, kept = features.images(self.shards, local=self.local)
        pairs = self.rows(kept)
        order = torch.tensor(list(pairs.values()))
        texts = features.texts([self.prefix + sample["json"]["statement"] for sample in kept])
        right, tied = picks(images[order], texts[order])
        by_pattern: dict[str, dict[str, bool]] = defaultdict(dict)
        for (number, (first, _)), answer in zip(pairs.items(), right.tolist(), strict=True):
            by_pattern[kept[first]["json"]["pattern"].lower().replace(" ", "_")][str(number)] = answer
        # Rank 1: both texts of a pair picked their own image.
        outcomes = {pattern: Outcome.of_answers(answers, answers.values()) for pattern, answers in by_pattern.items()}
        shares = {pattern: outcome.percent() for pattern, outcome in outcomes.items()}
        return Scores({"mean": fmean(shares.values()), **shares, "ties": float(tied.sum())}, outcomes)

    def figure(self, columns: Sequence[str], scorings: Sequence[Scores]) -> Figure | None:
        """Return one pair for each pattern, if possible one whose answer changed; None for a `local` rule."""
        if self.local is not None:
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
        kept = list(pictures(self.shards))
        for number, rows in self.rows(kept).items():
            pair = [kept[row] for row in rows]
            changed = len({answer[number] for answer in answers}) > 1
            by_pattern[pair[0]["json"]["pattern"]].append((not changed, number, pair))
        cells = []
        for pattern, candidates in by_pattern.items():
            _, number, (first, second) = min(candidates, key=lambda candidate: candidate[:2])
            verdicts = [
                (f"{column}: {'told apart' if answer[number] else 'mixed up'}", answer[number])
                for column, answer in zip(columns, answers, strict=True)
            ]
            cells.append(Cell(first["image"], pattern, [(first["json"]["statement"], None), *verdicts]))
            cells.append(Cell(second["image"], "", [(second["json"]["statement"], None)]))
        return gallery(cells, across=6)

    def rows(self, kept: Iterable[Sample]) -> dict[int, list[int]]:
        """Where the two samples of each pair stand."""
        pairs: dict[int, list[int]] = defaultdict(list)
        for row, sample in enumerate(kept):
            pairs[sample["json"]["pair"]].append(row)
        if halves := sum(len(pair) != 2 for pair in pairs.values()):
            raise ValueError(f"{halves} look-alikes in {self.shards} are not two pictures: write these shards again.")
        return pairs
