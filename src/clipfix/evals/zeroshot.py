"""Zero-shot classification: an image gets the class whose prompts are most similar."""

from collections.abc import Mapping, Sequence
from typing import TypedDict

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from clipfix.evals.base import Benchmark, Scores
from clipfix.evals.features import Features
from clipfix.evals.labels import is_single_thing, labels
from clipfix.evals.outcomes import Outcome
from clipfix.evals.ranking import ranks


class Question(TypedDict):
    """The classes of one factor and the prompt templates; `{}` in a template is the class."""

    classes: Sequence[str]
    templates: Sequence[str]


def heads(features: Features, classes: Sequence[str], templates: Sequence[str]) -> Float[Tensor, "c d"]:
    """Return [c, d] unit vectors: for each class the normalized mean of its normalized prompts.

    `{}` and `{c}` in a template are the class. Source: Radford et al. 2021 (arXiv 2103.00020), section 3.1.4; equal to
    `zero_shot_classifier` of clip_benchmark.
    """
    prompts = features.texts([template.format(name, c=name) for name in classes for template in templates])
    return normalize(prompts.unflatten(0, (len(classes), len(templates))).mean(dim=1), dim=-1)


def class_ranks(
    features: Features,
    images: Float[Tensor, "n d"],
    truth: Sequence[int],
    classes: Sequence[str],
    templates: Sequence[str],
) -> np.ndarray:
    """Return [n] ranks, from 1, of the correct class of each image among all classes.

    Args:
        features: Features of the model, for the prompts.
        images: [n, d] image features.
        truth: n indices into `classes`.
        classes: Names of the classes.
        templates: Prompt templates, as in `heads`.
    """
    wanted, numbers = torch.tensor(truth, device=images.device), torch.arange(len(classes), device=images.device)
    return ranks(images, heads(features, classes, templates), wanted, numbers).cpu().numpy()


class ZeroShot(Benchmark):
    """Accuracy by factor, with an ensemble of templates, on images of one thing: "a star" is wrong for three stars."""

    def __init__(self, shards: str | Sequence[str], questions: Mapping[str, Question]) -> None:
        self.shards, self.questions = shards, questions

    def score(self, features: Features) -> Scores:
        images, samples = features.images(self.shards)
        outcomes = {}
        for factor, question in self.questions.items():
            classes = list(question["classes"])
            answers = {row: name for row, name in labels(samples, factor).items() if is_single_thing(samples[row])}
            truth = [classes.index(name) for name in answers.values()]
            places = class_ranks(features, images[list(answers)], truth, classes, question["templates"])
            outcomes[factor] = Outcome(np.array([samples[row]["key"] for row in answers]), places)
        return Scores({factor: outcome.percent() for factor, outcome in outcomes.items()}, outcomes)
