"""Linear probes: which factors of a picture can be read off its embedding, whatever the text tower makes of them."""

from collections.abc import Sequence
from statistics import fmean

import numpy as np
from sklearn.linear_model import RidgeClassifierCV
from sklearn.metrics import balanced_accuracy_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from clipfix.evals.base import Benchmark, Scores
from clipfix.evals.features import Features
from clipfix.evals.labels import labels
from clipfix.evals.outcomes import Outcome, each_class_alike


class Probes(Benchmark):
    """A ridge classifier per factor, fitted on one split and scored on another in balanced accuracy.

    Fitted on the selection split: no weight was trained on it, so that a backbone that learned its training pictures
    by heart gains nothing, and every test picture can be scored. Balanced: guessing scores 100 / classes, however
    frequent the classes. The strength of the ridge is chosen by leave-one-out on the fitting split.
    """

    def __init__(
        self,
        fit_shards: str | Sequence[str],
        shards: str | Sequence[str],
        factors: Sequence[str],
        alphas: Sequence[float],
    ) -> None:
        self.fit_shards, self.shards, self.factors, self.alphas = fit_shards, shards, list(factors), list(alphas)

    def score(self, features: Features) -> Scores:
        fit_images, fit_samples = features.images(self.fit_shards)
        images, samples = features.images(self.shards)
        shares, outcomes = {}, {}
        for factor in self.factors:
            known, asked = labels(fit_samples, factor), labels(samples, factor)
            if len(set(known.values())) < 2 or not asked:
                continue  # a world too small to ask; a factor without a score is absent from the table
            probe = make_pipeline(StandardScaler(), RidgeClassifierCV(self.alphas, class_weight="balanced"))
            probe.fit(fit_images[list(known)].double().cpu().numpy(), list(known.values()))
            answers = probe.predict(images[list(asked)].double().cpu().numpy())
            truth = np.array(list(asked.values()))
            shares[factor] = 100 * float(balanced_accuracy_score(truth, answers))
            items = [samples[row]["key"] for row in asked]
            outcomes[factor] = Outcome.of_answers(items, answers == truth, each_class_alike(truth))
        return Scores({"mean": fmean(shares.values()), **shares}, outcomes)
