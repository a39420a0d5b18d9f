"""Zero-shot classification of pictures that show several classes at once: VOC2007."""

import numpy as np
from sklearn.metrics import average_precision_score

from clipfix.data.sets import Labelled
from clipfix.evals.base import Benchmark, Scores
from clipfix.evals.features import Features
from clipfix.evals.zeroshot import heads


class MultiLabel(Benchmark):
    """How well each class sorts the pictures that show it before the others: mean average precision over classes.

    By the data set's own classes and templates. A model that sees nothing scores the share of pictures that show a
    class. An average precision is no share of right answers: `outcomes` stays empty, and no interval is given.
    Source: clip_benchmark, `zeroshot_classification`, whose name the metric has. Departs: equal scores count as one
    threshold, there they count in stored order.
    """

    def __init__(self, shards: Labelled) -> None:
        self.shards = shards

    def score(self, features: Features) -> Scores:
        images, kept = features.images(self.shards)
        scores = images @ heads(features, self.shards.classes(), self.shards.templates()).T
        truth = np.array([sample["json"]["label"] for sample in kept])
        precision = float(average_precision_score(truth, scores.cpu().numpy()))
        return Scores({"mean_average_precision": 100 * precision})
