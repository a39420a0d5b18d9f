"""Linear probes: which factors of an image its embedding encodes, independently of the text tower."""

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
from clipfix.evals.outcomes import Outcome, class_balanced_weights


class Probes(Benchmark):
    """Balanced accuracy of a ridge classifier for each factor, fitted on one split and scored on another.

    The config fits on the selection split. No weights are trained on it, so a backbone that memorized its training
    images has no advantage. Chance is 100 / classes, for any class frequencies.

    Args:
        fit_shards: Data that the classifiers are fitted on.
        shards: Data that they are scored on.
        factors: The factors of the synthetic world, one classifier each.
        alphas: Ridge penalties, of which leave-one-out on `fit_shards` selects one.
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
            fit_labels, test_labels = labels(fit_samples, factor), labels(samples, factor)
            if len(set(fit_labels.values())) < 2 or not test_labels:
                continue  # the data is too small; the table then lacks this factor
            probe = make_pipeline(StandardScaler(), RidgeClassifierCV(self.alphas, class_weight="balanced"))
            probe.fit(fit_images[list(fit_labels)].double().cpu().numpy(), list(fit_labels.values()))
            answers = probe.predict(images[list(test_labels)].double().cpu().numpy())
            truth = np.array(list(test_labels.values()))
            shares[factor] = 100 * float(balanced_accuracy_score(truth, answers))
            items = [samples[row]["key"] for row in test_labels]
            outcomes[factor] = Outcome.of_answers(items, answers == truth, class_balanced_weights(truth))
        return Scores({"mean": fmean(shares.values()), **shares}, outcomes)
