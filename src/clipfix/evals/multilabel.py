"""Zero-shot classification of images with several labels: VOC2007."""

import numpy as np
from sklearn.metrics import average_precision_score

from clipfix.data.sets import Labelled
from clipfix.evals.base import Benchmark, Scores
from clipfix.evals.features import Features
from clipfix.evals.zeroshot import heads


class MultiLabel(Benchmark):
    """Mean average precision over classes, with the classes and prompt templates of the data set.

    A model without information scores the share of images that show a class. An average precision is not a share of
    correct answers, so `outcomes` is empty and there is no interval.
    Source: clip_benchmark, `zeroshot_classification`, which names the metric alike.
    Departs: equal scores are one threshold; in clip_benchmark they count in stored order.
    """

    def __init__(self, shards: Labelled) -> None:
        self.shards = shards

    def score(self, features: Features) -> Scores:
        images, samples = features.images(self.shards)
        scores = images @ heads(features, self.shards.classes(), self.shards.templates()).T
        truth = np.array([sample["json"]["label"] for sample in samples])
        precision = float(average_precision_score(truth, scores.cpu().numpy()))
        return Scores({"mean_average_precision": 100 * precision})
