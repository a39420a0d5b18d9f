"""One picture, its caption, and a foil: a caption that differs in what CLIP is known to overlook."""

from collections import defaultdict
from statistics import fmean

from clipfix.evals.base import Benchmark, Scores
from clipfix.evals.embed import Shards
from clipfix.evals.features import Features
from clipfix.evals.outcomes import Outcome


class Foils(Benchmark):
    """How often a picture prefers its caption to the foil, for each subset, and the mean over subsets; chance is 50.

    A tie is not a preference; `ties` counts them. The json of a sample has `caption`, `foil` and `subset`.
    Source: SugarCrepe (arXiv 2306.14610), main_eval.py. clip_benchmark's `text_acc` differs in ties, which it gives to
    the caption.
    """

    def __init__(self, shards: Shards) -> None:
        self.shards = shards

    def score(self, features: Features) -> Scores:
        images, kept = features.images(self.shards)
        # A product and a sum instead of a matmul: equal texts then have equal scores on every device.
        own, other = (
            (images * features.texts([sample["json"][name] for sample in kept])).sum(-1) for name in ("caption", "foil")
        )
        by_subset: dict[str, dict[str, bool]] = defaultdict(dict)
        for sample, right in zip(kept, (own > other).tolist(), strict=True):
            by_subset[sample["json"]["subset"]][sample["key"]] = right
        # Rank 1: the caption is nearer than the foil.
        outcomes = {subset: Outcome.of_answers(answers, answers.values()) for subset, answers in by_subset.items()}
        shares = {subset: outcome.percent() for subset, outcome in outcomes.items()}
        return Scores({"mean": fmean(shares.values()), **shares, "ties": float((own == other).sum())}, outcomes)
