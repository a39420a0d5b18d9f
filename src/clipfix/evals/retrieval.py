"""Image-text retrieval in both directions."""

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

SHOWN = 12  # images in the figure


def retrieval_ranks(
    keys: Sequence[str],
    images: Float[Tensor, "n d"],
    texts: Float[Tensor, "m d"],
    counts: Sequence[int] | None = None,
) -> Outcomes:
    """Return the ranks of the captions of each image among all texts, and of the image of each text among all images.

    With several captions per image, each of them is a hit. An identical caption of another image is not, so recall
    stays below 100 with duplicate captions. Source: clip_benchmark, `zeroshot_retrieval`. Equal to the mean of
    `retrieval_hit_rate` of torchmetrics, which takes one query at a time.

    Args:
        keys: n names of the images.
        images: [n, d] features.
        texts: [m, d] features, in the order of the images.
        counts: The number of texts of each image; None if all have the same number.
    """
    image_ids = torch.arange(len(images), device=images.device)
    each = len(texts) // len(images) if counts is None else torch.tensor(counts, device=images.device)
    text_ids = image_ids.repeat_interleave(each)
    names = np.array(keys)
    return {
        "image_to_text": Outcome(names, ranks(images, texts, image_ids, text_ids).cpu().numpy()),
        "text_to_image": Outcome(
            names[text_ids.cpu().numpy()], ranks(texts, images, text_ids, image_ids).cpu().numpy()
        ),
    }


class Retrieval(Benchmark):
    """R@k in both directions.

    Args:
        shards: The data.
        text: Which captions are used: arguments of `Text` (`key`, `pick`, `k`), as in `data.texts`. With `pick: all`
            and `k: null` every caption is used, and images may have different numbers of captions.
        recall_at: The values of k.
        allow_pipe: Whether urls may run commands.
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
        """Return R@k in both directions; `examples` holds (retrieved caption, whether it is correct) by image."""
        images, samples = features.images(self.shards, self.allow_pipe)
        captions = [self.text.draw(sample, Random(sample["key"])) for sample in samples]
        flat = [caption for of_image in captions for caption in of_image]
        texts = features.texts(flat)
        nearest = (images[:SHOWN] @ texts.T).argmax(dim=1).tolist()
        examples = [(flat[text], flat[text] in captions[i]) for i, text in enumerate(nearest)]
        ways = retrieval_ranks([sample["key"] for sample in samples], images, texts, [len(one) for one in captions])
        shares = {f"{way}_R@{k}": outcome.percent(k) for way, outcome in ways.items() for k in self.recall_at}
        return Scores({"mean": fmean(shares.values()), **shares}, ways, examples)

    def figure(self, columns: Sequence[str], scorings: Sequence[Scores]) -> Figure | None:
        """Return the first images, each with its caption and the caption that each scoring retrieved."""
        shown = islice(pictures(self.shards or (), self.allow_pipe), SHOWN)
        cells = []
        for i, sample in enumerate(shown):
            caption = self.text.draw(sample, Random(sample["key"]))[0]
            retrieved = [scoring.examples[i] for scoring in scorings]
            caption, *texts = strip_common_sentences([caption, *(text for text, _ in retrieved)])
            lines = [
                (f"{name}: {text}", right) for name, text, (_, right) in zip(columns, texts, retrieved, strict=True)
            ]
            cells.append(Cell(sample["image"], "", [(caption, None), *lines]))
        return gallery(cells, across=4)


def strip_common_sentences(texts: Sequence[str]) -> list[str]:
    """Return the texts without the first sentences that all of them share, so that a figure shows where they differ."""
    sentences = [text.split(". ") for text in texts]
    shared = len(list(takewhile(lambda places: len(set(places)) == 1, zip(*sentences, strict=False))))
    if shared == 0 or any(len(one) == shared for one in sentences):
        return list(texts)
    return ["... " + ". ".join(one[shared:]) for one in sentences]
