"""Winoground: match two images with two captions that contain the same words."""

import torch

from clipfix.evals.base import Scores
from clipfix.evals.features import Features
from clipfix.evals.outcomes import Outcome
from clipfix.evals.pairs import Pairs, picks


class Groups(Pairs):
    """Winoground's text, image and group scores, on the same data as `Pairs`. Chance is 25, 25 and 16.7.

    `text`: both images are most similar to their caption. `image`: both captions are most similar to their image.
    `group`: both hold. A tie counts as wrong.
    Source: Thrush et al. 2022 (arXiv 2204.03162), section 4.1. Equal to `text_acc`, `image_acc` and `acc` of
    `image_caption_selection` in clip_benchmark, except for ties.
    """

    def score(self, features: Features) -> Scores:
        images, samples = features.images(self.shards)
        pairs = self.rows(samples)
        order = torch.tensor(list(pairs.values()))
        texts = features.texts([self.prefix + sample["json"]["statement"] for sample in samples])
        image, image_ties = picks(images[order], texts[order])
        text, text_ties = picks(texts[order], images[order])
        shares = {"text": text, "image": image, "group": text & image}
        outcomes = {name: Outcome.of_answers(map(str, pairs), right.tolist()) for name, right in shares.items()}
        values = {name: outcome.percent() for name, outcome in outcomes.items()}
        return Scores(values | {"ties": float(image_ties.sum() + text_ties.sum())}, outcomes)
