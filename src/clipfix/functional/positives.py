"""Positives among the unpaired images and captions of a batch, found by a reference model."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor


class ReferenceFeatures(NamedTuple):
    """Features of n images and of the k captions of each, from a frozen reference CLIP.

    Rows have unit norm, except those of `mean_text`, which are means over captions. They serve to compare the captions
    of two images: the product of two means is the mean cosine over all pairs of their captions.
    """

    image: Float[Tensor, "n d"]
    text: Float[Tensor, "n k d"]
    mean_text: Float[Tensor, "n d"]

    def rows(self, part: slice | list[int]) -> "ReferenceFeatures":
        """Return the features of some of the samples."""
        return ReferenceFeatures(self.image[part], self.text[part], self.mean_text[part])


class Thresholds(NamedTuple):
    """Cosines above which a pair is promoted; `supported` is the lower threshold for pairs with a second condition."""

    image_text: float
    supported: float
    image_image: float
    text_text: float


class Positives(NamedTuple):
    """By condition, whether image i and caption c of sample j are positives. A pair may meet several conditions."""

    same_sample: Bool[Tensor, "b n k"]
    image_text: Bool[Tensor, "b n k"]
    image_image: Bool[Tensor, "b n k"]
    text_text: Bool[Tensor, "b n k"]

    def any(self) -> Bool[Tensor, "b n k"]:
        """Return whether a pair meets any of the conditions."""
        return self.same_sample | self.image_text | self.image_image | self.text_text


def same_samples(queries: int, samples: int, first_row: int, device: torch.device) -> Bool[Tensor, "b n"]:
    """Return where query i and sample j are the same: j = `first_row + i`.

    With a tile of the samples, `first_row + i` may be negative or above the number of samples; such a query has no
    entry.
    """
    rows = torch.arange(queries, device=device)[:, None] + first_row
    return rows == torch.arange(samples, device=device)


def mine(queries: ReferenceFeatures, samples: ReferenceFeatures, thresholds: Thresholds, first_row: int) -> Positives:
    """Return which captions of n samples are positives of each of b query images, by the reference's cosines.

    An image and a caption of another sample are positives if their cosine is above `image_text`. They are also
    positives if it is above `supported` and either the cosine of the two images is above `image_image`, or that of the
    two samples' mean captions above `text_text`. An image and its own captions are always positives.

    Args:
        queries: features of the b images and their captions.
        samples: features of the n samples.
        thresholds: cosines above which a condition holds.
        first_row: query i is sample `first_row + i`.

    Source: FFF (arXiv 2405.10286), section 3.2. There is no public code; the nesting is our reading of the text.
    """
    pair = torch.einsum("bd,nkd->bnk", queries.image, samples.text)
    same = same_samples(len(queries.image), len(samples.image), first_row, pair.device)[..., None]
    images = (queries.image @ samples.image.T > thresholds.image_image)[..., None] & ~same
    texts = (queries.mean_text @ samples.mean_text.T > thresholds.text_text)[..., None] & ~same
    image_text, likely = (pair > thresholds.image_text).logical_and_(~same), pair > thresholds.supported
    return Positives(same.expand_as(pair), image_text, likely & images, likely & texts)


def thresholds_for(reference: ReferenceFeatures, extra: Thresholds, among: int) -> Thresholds:
    """Return thresholds with which each condition alone adds `extra` positives to an image, on average.

    A cosine that suits one model does not suit another, because the mean cosine of unrelated pairs differs from model
    to model (0.16 or 0.41, for example). A number of positives suits all models.

    Args:
        reference: features of some samples, possibly fewer than a batch has.
        extra: number of positives for each image, by condition, out of `among` samples. Pairs of equal cosine are
            either all positives or none of them, so there may be fewer.
        among: number of samples in a batch.
    """
    samples, captions = reference.text.shape[:2]
    same = torch.eye(samples, dtype=torch.bool, device=reference.image.device)
    scale = samples * (samples - 1) / (among - 1)

    def above(cosines: Float[Tensor, "n n"] | Float[Tensor, "n n k"], count: float) -> float:
        flat = cosines[~same].flatten()
        positives = min(round(count * scale), len(flat) - 1)
        return flat.topk(positives + 1).values[-1].item()

    pair = torch.einsum("id,jkd->ijk", reference.image, reference.text)
    return Thresholds(
        above(pair, extra.image_text * captions),
        above(pair, extra.supported * captions),
        above(reference.image @ reference.image.T, extra.image_image),
        above(reference.mean_text @ reference.mean_text.T, extra.text_text),
    )
