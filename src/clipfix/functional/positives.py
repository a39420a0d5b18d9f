"""Which image and caption belong together though the data never paired them."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor


class Frozen(NamedTuple):
    """What a frozen reference CLIP says of n images and the k captions of each; rows are unit norm, but for `gist`.

    `gist` is the mean of the caption features by which texts are compared with texts: the product of two gists is the
    mean over all pairs of their captions.
    """

    image: Float[Tensor, "n d"]
    text: Float[Tensor, "n k d"]
    gist: Float[Tensor, "n d"]

    def rows(self, part: slice) -> "Frozen":
        return Frozen(self.image[part], self.text[part], self.gist[part])


class Thresholds(NamedTuple):
    """Cosines above which a pair is promoted; `supported` is the lower bar of pairs that image or text supports."""

    image_text: float
    supported: float
    image_image: float
    text_text: float


class Positives(NamedTuple):
    """Image i with caption c of sample j, by what makes them a positive; a pair may have several reasons."""

    own: Bool[Tensor, "b n k"]
    image_text: Bool[Tensor, "b n k"]
    image_image: Bool[Tensor, "b n k"]
    text_text: Bool[Tensor, "b n k"]

    def any(self) -> Bool[Tensor, "b n k"]:
        return self.own | self.image_text | self.image_image | self.text_text


def itself(queries: int, samples: int, first_row: int, device: torch.device) -> Bool[Tensor, "b n"]:
    """Query i is sample `first_row + i`, which may lie outside of the samples, as it does for a tile of them."""
    rows = torch.arange(queries, device=device)[:, None] + first_row
    return rows == torch.arange(samples, device=device)


def mine(queries: Frozen, samples: Frozen, thresholds: Thresholds, first_row: int) -> Positives:
    """Pairs of b images and n samples that the reference finds alike; query i is sample `first_row + i` itself.

    An image and a caption of another sample are positives if their similarity is above `image_text`; or above
    `supported`, if also the two images are alike above `image_image` or the captions of both above `text_text`. Its own
    captions are positives whatever they say.

    Source: FFF (arXiv 2405.10286), section 3.2. There is no public code; the nesting is read from the text.
    """
    pair = torch.einsum("bd,nkd->bnk", queries.image, samples.text)
    own = itself(len(queries.image), len(samples.image), first_row, pair.device)[..., None]
    images = (queries.image @ samples.image.T > thresholds.image_image)[..., None] & ~own
    texts = (queries.gist @ samples.gist.T > thresholds.text_text)[..., None] & ~own
    image_text, likely = (pair > thresholds.image_text).logical_and_(~own), pair > thresholds.supported
    return Positives(own.expand_as(pair), image_text, likely & images, likely & texts)


def thresholds_for(reference: Frozen, extra: Thresholds, among: int) -> Thresholds:
    """The cosines above which each condition, taken alone, promotes so many of `among` samples an image on average.

    Cosines of one model mean nothing in another, whose mean may be 0.16 or 0.41; how many positives one expects does.
    The reference may know fewer samples than a batch of `among` has. Pairs of equal cosine stand or fall together, so
    there may be fewer.
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
        above(reference.gist @ reference.gist.T, extra.text_text),
    )
