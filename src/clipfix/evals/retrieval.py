"""Retrieval: find the caption of a picture among all captions, and the picture of a caption among all pictures."""

from collections.abc import Mapping, Sequence
from itertools import islice, takewhile
from random import Random
from statistics import fmean
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

from clipfix.data.texts import Text
from clipfix.evals.base import Benchmark, Scores
from clipfix.evals.embed import Shards, pictures
from clipfix.evals.features import Features
from clipfix.evals.outcomes import Outcome, Outcomes
from clipfix.evals.plots import Cell, gallery
from clipfix.evals.ranking import ranks

SHOWN = 12  # pictures in the figure


def both_ways(
    keys: Sequence[str],
    images: Float[Tensor, "n d"],
    texts: Float[Tensor, "m d"],
    counts: Sequence[int] | None = None,
) -> Outcomes:
    """Ranks of texts by image and of images by text; each image's texts are side by side, as many or `counts`.

    With several captions a picture, any one of them is a hit. Pictures with the very same caption are rivals all the
    same, so junk captions keep recall below 100. Source: clip_benchmark, `zeroshot_retrieval`; the same as the mean of
    torchmetrics' `retrieval_hit_rate`, which takes one query at a time.
    """
    picture = torch.arange(len(images), device=images.device)
    each = len(texts) // len(images) if counts is None else torch.tensor(counts, device=images.device)
    owner = picture.repeat_interleave(each)
    names = np.array(keys)
    return {
        "image_to_text": Outcome(names, ranks(images, texts, picture, owner).cpu().numpy()),
        "text_to_image": Outcome(names[owner.cpu().numpy()], ranks(texts, images, owner, picture).cpu().numpy()),
    }


class Retrieval(Benchmark):
    """R@k both ways, with the captions that `text` picks (`key`, `pick`, `k`: as data.texts does in training).

    `k: null` with `pick: all` takes every caption there is, so some pictures may have more than others.
    """

    def __init__(
        self,
        shards: Shards | None,
        text: Mapping[str, Any],
        recall_at: Sequence[int],
        allow_pipe: bool = False,
    ) -> None:
        self.shards, self.text, self.recall_at, self.allow_pipe = shards, Text(**text), list(recall_at), allow_pipe

    def score(self, features: Features) -> Scores:
        """Return R@k both ways; `examples` has (nearest caption, whether it is a right one) of each shown picture."""
        images, kept = features.images(self.shards, self.allow_pipe)
        captions = [self.text.draw(sample, Random(sample["key"])) for sample in kept]
        flat = [caption for several in captions for caption in several]
        texts = features.texts(flat)
        nearest = (images[:SHOWN] @ texts.T).argmax(dim=1).tolist()
        examples = [(flat[text], flat[text] in captions[i]) for i, text in enumerate(nearest)]
        ways = both_ways([sample["key"] for sample in kept], images, texts, [len(several) for several in captions])
        shares = {f"{way}_R@{k}": outcome.percent(k) for way, outcome in ways.items() for k in self.recall_at}
        return Scores({"mean": fmean(shares.values()), **shares}, ways, examples)

    def figure(self, columns: Sequence[str], scorings: Sequence[Scores]) -> Figure | None:
        """Return the first pictures, each with the caption that every scoring found for it."""
        shown = islice(pictures(self.shards or (), self.allow_pipe), SHOWN)
        cells = []
        for i, sample in enumerate(shown):
            own = self.text.draw(sample, Random(sample["key"]))[0]
            found = [scoring.examples[i] for scoring in scorings]
            own, *texts = without_shared_beginning([own, *(text for text, _ in found)])
            lines = [(f"{name}: {text}", right) for name, text, (_, right) in zip(columns, texts, found, strict=True)]
            cells.append(Cell(sample["image"], "", [(own, None), *lines]))
        return gallery(cells, across=4)


def without_shared_beginning(texts: Sequence[str]) -> list[str]:
    """Texts without the sentences that all of them open with, which would hide where they part."""
    sentences = [text.split(". ") for text in texts]
    shared = len(list(takewhile(lambda places: len(set(places)) == 1, zip(*sentences, strict=False))))
    if shared == 0 or any(len(one) == shared for one in sentences):
        return list(texts)
    return ["... " + ". ".join(one[shared:]) for one in sentences]
