"""Two pictures and two captions of the same words: which belongs to which?"""

import torch

from clipfix.evals.base import Scores
from clipfix.evals.features import Features
from clipfix.evals.outcomes import Outcome
from clipfix.evals.pairs import Pairs, picks


class Groups(Pairs):
    """Winoground's scores, on samples as `Pairs` reads them; chance is 25, 25 and 16.7.

    `text`: each picture picks its caption. `image`: each caption picks its picture. `group`: both. A tie is no pick.
    Source: Thrush et al. 2022 (arXiv 2204.03162), section 4.1; clip_benchmark's `text_acc`, `image_acc` and `acc` of
    `image_caption_selection`, up to ties.
    """

    def score(self, features: Features) -> Scores:
        images, kept = features.images(self.shards)
        pairs = self.rows(kept)
        order = torch.tensor(list(pairs.values()))
        texts = features.texts([self.prefix + sample["json"]["statement"] for sample in kept])
        image, tied = picks(images[order], texts[order])
        text, tied_too = picks(texts[order], images[order])
        shares = {"text": text, "image": image, "group": text & image}
        outcomes = {name: Outcome.of_answers(map(str, pairs), right.tolist()) for name, right in shares.items()}
        values = {name: outcome.percent() for name, outcome in outcomes.items()}
        return Scores(values | {"ties": float(tied.sum() + tied_too.sum())}, outcomes)
