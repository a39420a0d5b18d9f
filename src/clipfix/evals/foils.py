"""Caption against foil: a foil is a wrong caption that differs in a detail which CLIP often overlooks."""

from collections import defaultdict
from statistics import fmean

from clipfix.evals.base import Benchmark, Scores
from clipfix.evals.embed import Shards
from clipfix.evals.features import Features
from clipfix.evals.outcomes import Outcome


class Foils(Benchmark):
    """Share of images that are more similar to their caption than to the foil, by subset, and the mean over subsets.

    Chance is 50. A tie counts as wrong; `ties` is the number of ties.
    Source: SugarCrepe (arXiv 2306.14610), main_eval.py. `text_acc` of clip_benchmark counts a tie as correct.

    Args:
        shards: The data. The json of a sample has `caption`, `foil` and `subset`.
    """

    def __init__(self, shards: Shards) -> None:
        self.shards = shards

    def score(self, features: Features) -> Scores:
        images, samples = features.images(self.shards)
        # With a matmul, equal texts could have different scores on some devices.
        caption, foil = (
            (images * features.texts([sample["json"][name] for sample in samples])).sum(-1)
            for name in ("caption", "foil")
        )
        by_subset: dict[str, dict[str, bool]] = defaultdict(dict)
        for sample, right in zip(samples, (caption > foil).tolist(), strict=True):
            by_subset[sample["json"]["subset"]][sample["key"]] = right
        outcomes = {subset: Outcome.of_answers(answers, answers.values()) for subset, answers in by_subset.items()}
        shares = {subset: outcome.percent() for subset, outcome in outcomes.items()}
        return Scores({"mean": fmean(shares.values()), **shares, "ties": float((caption == foil).sum())}, outcomes)
