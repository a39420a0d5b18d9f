"""Zero-shot classification of published data sets: ImageNet and its family, CIFAR, VTAB+."""

from collections.abc import Sequence

import numpy as np

from clipfix.data.sets import Labelled
from clipfix.evals.base import Benchmark, Scores
from clipfix.evals.features import Features
from clipfix.evals.outcomes import Outcome, class_balanced_weights
from clipfix.evals.zeroshot import class_ranks

TOP = 5  # top-5 accuracy is computed for this many classes or more, as in clip_benchmark


class Classification(Benchmark):
    """Top-1 accuracy, top-5 accuracy and mean recall over classes of a zero-shot classifier.

    Source: clip_benchmark, `zeroshot_classification`, which names the metrics alike.

    Args:
        shards: The data set, which defines classes and prompt templates.
        templates: Prompt templates that replace those of the data set.
    """

    def __init__(self, shards: Labelled, templates: Sequence[str] | None = None) -> None:
        self.shards, self.templates = shards, templates

    def score(self, features: Features) -> Scores:
        images, samples = features.images(self.shards)
        classes = self.shards.classes()
        truth = [sample["json"]["label"] for sample in samples]
        places = class_ranks(features, images, truth, classes, self.templates or self.shards.templates())
        items = np.array([sample["key"] for sample in samples])
        # Classes without an image do not count in the mean, as in balanced_accuracy_score of sklearn.
        weights = class_balanced_weights(np.array(truth))
        outcomes = {
            "acc1": Outcome(items, places),
            "mean_per_class_recall": Outcome(items, places, weights),
        }
        if len(classes) >= TOP:
            outcomes["acc5"] = Outcome(items, np.where(places <= TOP, 1, places))
        return Scores({name: outcome.percent() for name, outcome in outcomes.items()}, outcomes)
