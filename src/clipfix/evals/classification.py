"""Zero-shot classification of published data sets: ImageNet and its family, CIFAR, VTAB+."""

from collections.abc import Sequence

import numpy as np
import torch

from clipfix.evals import Benchmark
from clipfix.evals.embed import Features
from clipfix.evals.ranks import ranks
from clipfix.evals.sets import Labelled
from clipfix.evals.zeroshot import heads
from clipfix.outcomes import Outcome, Outcomes

FIVE = 5  # classes or more, and the top five are asked for as well, as clip_benchmark does


class Classification(Benchmark):
    """Top-1 and top-5 accuracy and the mean recall over classes, by the data set's own classes and templates.

    `templates` replaces the latter. Source: clip_benchmark, `zeroshot_classification`, whose names the metrics have.
    """

    def __init__(self, shards: Labelled, templates: Sequence[str] | None = None) -> None:
        self.shards, self.given = shards, templates
        self.outcomes: list[Outcomes] = []  # ranks among the classes

    def score(self, features: Features) -> dict[str, float]:
        images, kept = features.images(self.shards)
        classes = self.shards.classes()
        truth = torch.tensor([sample["json"]["label"] for sample in kept], device=images.device)
        prompts = heads(features, classes, self.given or self.shards.templates())
        places = ranks(images, prompts, truth, torch.arange(len(classes), device=images.device)).cpu().numpy()
        items = np.array([sample["key"] for sample in kept])
        # Classes without a picture are left out of the mean, as by sklearn's balanced_accuracy_score.
        _, kinds, counts = np.unique(truth.cpu().numpy(), return_inverse=True, return_counts=True)
        found = {"acc1": Outcome(items, places), "mean_per_class_recall": Outcome(items, places, 1 / counts[kinds])}
        if len(classes) >= FIVE:
            found["acc5"] = Outcome(items, np.where(places <= FIVE, 1, places))
        self.outcomes.append(found)
        return {name: outcome.percent() for name, outcome in found.items()}
