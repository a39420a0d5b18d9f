"""Zero-shot classification: the class whose prompts lie nearest, no training."""

from collections.abc import Mapping, Sequence
from typing import TypedDict

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from clipfix.evals import Benchmark
from clipfix.evals.embed import Features
from clipfix.evals.labels import alone, labels
from clipfix.evals.ranks import ranks
from clipfix.outcomes import Outcome, Outcomes


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
        self.outcomes: list[Outcomes] = []  # ranks among the classes

    def score(self, features: Features) -> dict[str, float]:
        images, samples = features.images(self.shards)
        found = {}
        for factor, question in self.questions.items():
            classes = list(question["classes"])
            asked = {row: name for row, name in labels(samples, factor).items() if alone(samples[row])}
            truth = torch.tensor([classes.index(name) for name in asked.values()], device=images.device)
            prompts = heads(features, classes, question["templates"])
            places = ranks(images[list(asked)], prompts, truth, torch.arange(len(classes), device=images.device))
            found[factor] = Outcome(np.array([samples[row]["key"] for row in asked]), places.cpu().numpy())
        self.outcomes.append(found)
        return {factor: outcome.percent() for factor, outcome in found.items()}
