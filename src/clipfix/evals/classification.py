"""Zero-shot classification of published data sets: ImageNet and its family, CIFAR, VTAB+."""

from collections.abc import Sequence

import torch
from torchmetrics.functional.classification import multiclass_accuracy

from clipfix.evals import Benchmark
from clipfix.evals.embed import Features
from clipfix.evals.sets import Labelled
from clipfix.evals.zeroshot import heads

FIVE = 5  # classes or more, and the top five are asked for as well, as clip_benchmark does


class Classification(Benchmark):
    """Top-1 and top-5 accuracy and the mean recall over classes, by the data set's own classes and templates.

    `templates` replaces the latter. Source: clip_benchmark, `zeroshot_classification`, whose names the metrics have.
    """

    def __init__(self, shards: Labelled, templates: Sequence[str] | None = None) -> None:
        self.shards, self.given = shards, templates

    def score(self, features: Features) -> dict[str, float]:
        images, kept = features.images(self.shards)
        classes = self.shards.classes()
        truth = torch.tensor([sample["json"]["label"] for sample in kept], device=images.device)
        similarity = images @ heads(features, classes, self.given or self.shards.templates()).T
        # Classes without a picture are left out of the mean, as by sklearn's balanced_accuracy_score.
        asked = truth.unique()
        recalls = multiclass_accuracy(similarity, truth, num_classes=len(classes), average="none")[asked]
        found = {
            "acc1": multiclass_accuracy(similarity, truth, num_classes=len(classes), average="micro"),
            "mean_per_class_recall": recalls.mean(),
        }
        if len(classes) >= FIVE:
            found["acc5"] = multiclass_accuracy(
                similarity, truth, num_classes=len(classes), average="micro", top_k=FIVE
            )
        return {name: 100 * value.item() for name, value in found.items()}
