"""Zero-shot classification: the class whose prompts lie nearest, no training."""

from collections.abc import Mapping, Sequence
from typing import TypedDict

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize
from torchmetrics.functional.classification import multiclass_accuracy

from clipfix.evals import Benchmark
from clipfix.evals.embed import Features
from clipfix.evals.labels import alone, labels


class Question(TypedDict):
    """The classes of one factor, and the templates that turn each into prompts; `{}` is the class."""

    classes: Sequence[str]
    templates: Sequence[str]


def heads(features: Features, classes: Sequence[str], templates: Sequence[str]) -> Float[Tensor, "c d"]:
    """A unit vector for each class: the normalized mean of its normalized prompts; `{}` and `{c}` are the class.

    Source: Radford et al. 2021 (arXiv 2103.00020), 3.1.4; the same vector as `zero_shot_classifier` of clip_benchmark.
    """
    prompts = features.texts([template.format(name, c=name) for name in classes for template in templates])
    return normalize(prompts.unflatten(0, (len(classes), len(templates))).mean(dim=1), dim=-1)


class ZeroShot(Benchmark):
    """Accuracy per factor by an ensemble of templates, on pictures of one thing: "a star" does not name three stars."""

    def __init__(self, shards: str | Sequence[str], questions: Mapping[str, Question]) -> None:
        self.shards, self.questions = shards, questions

    def score(self, features: Features) -> dict[str, float]:
        images, samples = features.images(self.shards)
        scores = {}
        for factor, question in self.questions.items():
            classes = list(question["classes"])
            asked = {row: name for row, name in labels(samples, factor).items() if alone(samples[row])}
            truth = torch.tensor([classes.index(name) for name in asked.values()], device=images.device)
            similarity = images[list(asked)] @ heads(features, classes, question["templates"]).T
            right = multiclass_accuracy(similarity, truth, num_classes=len(classes), average="micro")
            scores[factor] = 100 * right.item()
        return scores
