"""Zero-shot classification of published data sets: ImageNet and its family, CIFAR, VTAB+."""

from collections.abc import Sequence

import numpy as np

from clipfix.data.sets import Labelled
from clipfix.evals.base import Benchmark, Scores
from clipfix.evals.features import Features
from clipfix.evals.outcomes import Outcome, each_class_alike
from clipfix.evals.zeroshot import places_among

FIVE = 5  # classes or more, and the top five are asked for as well, as clip_benchmark does


class Classification(Benchmark):
    """Top-1 and top-5 accuracy and the mean recall over classes, by the data set's own classes and templates.

    `templates` replaces the latter. Source: clip_benchmark, `zeroshot_classification`, whose names the metrics have.
    """

    def __init__(self, shards: Labelled, templates: Sequence[str] | None = None) -> None:
        self.shards, self.given = shards, templates

    def score(self, features: Features) -> Scores:
        images, kept = features.images(self.shards)
        classes = self.shards.classes()
        truth = [sample["json"]["label"] for sample in kept]
        places = places_among(features, images, truth, classes, self.given or self.shards.templates())
        items = np.array([sample["key"] for sample in kept])
        # Classes without a picture are left out of the mean, as by sklearn's balanced_accuracy_score.
        weights = each_class_alike(np.array(truth))
        outcomes = {"acc1": Outcome(items, places), "mean_per_class_recall": Outcome(items, places, weights)}
        if len(classes) >= FIVE:
            outcomes["acc5"] = Outcome(items, np.where(places <= FIVE, 1, places))
        return Scores({name: outcome.percent() for name, outcome in outcomes.items()}, outcomes)
