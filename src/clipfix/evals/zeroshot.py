"""Zero-shot classification: the class whose prompts lie nearest, no training."""

from collections.abc import Mapping, Sequence
from typing import TypedDict

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from clipfix.evals.base import Benchmark, Scores
from clipfix.evals.features import Features
from clipfix.evals.labels import alone, labels
from clipfix.evals.outcomes import Outcome
from clipfix.evals.ranking import ranks


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


def places_among(
    features: Features,
    images: Float[Tensor, "n d"],
    truth: Sequence[int],
    classes: Sequence[str],
    templates: Sequence[str],
) -> np.ndarray:
    """[n]: the place, from 1, of each picture's own class, a number into `classes`, among all of them."""
    wanted, numbers = torch.tensor(truth, device=images.device), torch.arange(len(classes), device=images.device)
    return ranks(images, heads(features, classes, templates), wanted, numbers).cpu().numpy()


class ZeroShot(Benchmark):
    """Accuracy per factor by an ensemble of templates, on pictures of one thing: "a star" does not name three stars."""

    def __init__(self, shards: str | Sequence[str], questions: Mapping[str, Question]) -> None:
        self.shards, self.questions = shards, questions

    def score(self, features: Features) -> Scores:
        images, samples = features.images(self.shards)
        outcomes = {}
        for factor, question in self.questions.items():
            classes = list(question["classes"])
            asked = {row: name for row, name in labels(samples, factor).items() if alone(samples[row])}
            truth = [classes.index(name) for name in asked.values()]
            places = places_among(features, images[list(asked)], truth, classes, question["templates"])
            outcomes[factor] = Outcome(np.array([samples[row]["key"] for row in asked]), places)
        return Scores({factor: outcome.percent() for factor, outcome in outcomes.items()}, outcomes)
