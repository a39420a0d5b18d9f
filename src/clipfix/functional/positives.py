"""Images and captions that belong together though the data never paired them."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor


class ReferenceFeatures(NamedTuple):
    """Features of n images and of the k captions of each, from a frozen reference CLIP.

    Rows have unit norm, except those of `mean_text`: means of the caption features by which texts are compared with
    texts. The product of two such means is the mean over all pairs of their captions.
    """

    image: Float[Tensor, "n d"]
    text: Float[Tensor, "n k d"]
    mean_text: Float[Tensor, "n d"]

    def rows(self, part: slice) -> "ReferenceFeatures":
        return ReferenceFeatures(self.image[part], self.text[part], self.mean_text[part])


class Thresholds(NamedTuple):
    """Cosines above which a pair is promoted; `supported` is the lower threshold for pairs with a second condition."""

    image_text: float
    supported: float
    image_image: float
    text_text: float


class Positives(NamedTuple):
    """Whether image i and caption c of sample j are positives, by condition; a pair may meet several."""

    own: Bool[Tensor, "b n k"]
    image_text: Bool[Tensor, "b n k"]
    image_image: Bool[Tensor, "b n k"]
    text_text: Bool[Tensor, "b n k"]

    def any(self) -> Bool[Tensor, "b n k"]:
        return self.own | self.image_text | self.image_image | self.text_text


def own_samples(queries: int, samples: int, first_row: int, device: torch.device) -> Bool[Tensor, "b n"]:
    """Return where query i is sample `first_row + i`, which may lie outside of the samples, as for a tile of them."""
    rows = torch.arange(queries, device=device)[:, None] + first_row
    return rows == torch.arange(samples, device=device)


def mine(queries: ReferenceFeatures, samples: ReferenceFeatures, thresholds: Thresholds, first_row: int) -> Positives:
    """Return the pairs of b images and n samples that the reference finds alike. Query i is sample `first_row + i`.

    An image and a caption of another sample are positives if their similarity is above `image_text`; or above
    `supported`, if also the two images are alike above `image_image` or the captions of both above `text_text`. Its own
    captions are positives whatever they say.

    Source: FFF (arXiv 2405.10286), section 3.2. There is no public code; the nesting is read from the text.
    """
    pair = torch.einsum("bd,nkd->bnk", queries.image, samples.text)
    own = own_samples(len(queries.image), len(samples.image), first_row, pair.device)[..., None]
    images = (queries.image @ samples.image.T > thresholds.image_image)[..., None] & ~own
    texts = (queries.mean_text @ samples.mean_text.T > thresholds.text_text)[..., None] & ~own
    image_text, likely = (pair > thresholds.image_text).logical_and_(~own), pair > thresholds.supported
    return Positives(own.expand_as(pair), image_text, likely & images, likely & texts)


def thresholds_for(reference: ReferenceFeatures, extra: Thresholds, among: int) -> Thresholds:
    """Return the cosines above which each condition alone adds `extra` positives to an image, on average.

    Cosines of one model mean nothing in another, whose mean may be 0.16 or 0.41; the number of positives does.

    Args:
        reference: features of some samples, possibly fewer than a batch has.
        extra: number of positives for each image, by condition, out of `among` samples. Pairs of equal cosine are
            promoted together or not at all, so there may be fewer.
        among: number of samples in a batch.
    """
    samples, captions = reference.text.shape[:2]
    own = torch.eye(samples, dtype=torch.bool, device=reference.image.device)
    scale = samples * (samples - 1) / (among - 1)

    def above(cosines: Float[Tensor, "n n"] | Float[Tensor, "n n k"], count: float) -> float:
        flat = cosines[~own].flatten()
        kept = min(round(count * scale), len(flat) - 1)
        return flat.topk(kept + 1).values[-1].item()

    pair = torch.einsum("id,jkd->ijk", reference.image, reference.text)
    return Thresholds(
        above(pair, extra.image_text * captions),
        above(pair, extra.supported * captions),
        above(reference.image @ reference.image.T, extra.image_image),
        above(reference.mean_text @ reference.mean_text.T, extra.text_text),
    )
