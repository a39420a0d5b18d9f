"""Unit-norm fp32 features of batches of images and texts: the plain embedding, or with patch tokens added."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from clipfix.data.decoding import FORMATS, samples
from clipfix.data.sets import Source
from clipfix.functional.patches import take_patches
from clipfix.models.base import Model, Patches

BATCH = 64  # images or texts in a forward pass; it changes memory, not features

Sample = dict[str, Any]  # key, txt and json of one sample, without its image
Shards = str | Sequence[str] | Source  # data of a benchmark: urls, or a published data set


def pictures(shards: Shards, allow_pipe: bool = False) -> Iterator[Sample]:
    """Yield all samples with their decoded images, for figures."""
    for sample in apart(shards if isinstance(shards, Source) else samples(shards, allow_pipe)):
        yield {**sample, "image": load_rgb(sample["image"])}


def apart(samples: Iterable[Sample]) -> Iterator[Sample]:
    """Yield samples whose keys differ: the second one of a key `a` becomes `a (2)`, as of shards that count from zero.

    Outcomes are stored by key, and rows with one key are resampled together.
    """
    seen: Counter[str] = Counter()
    for sample in samples:
        seen[sample["key"]] += 1
        number = seen[sample["key"]]
        yield sample if number == 1 else {**sample, "key": f"{sample['key']} ({number})"}


def load_rgb(image: Image.Image | Path) -> Image.Image:
    """Return an image in RGB, read from its file if a path is given.

    Raises:
        ValueError: The file cannot be read. It is not skipped, because scores of an incomplete data set do not
            compare with published ones.
    """
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    try:
        with Image.open(image, formats=FORMATS) as opened:
            return opened.convert("RGB")
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"The image {image} cannot be read ({error}): download its data set again.") from error


def embed_images(model: Model, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
    """Return the plain image embeddings with unit norm."""
    device = next(model.parameters()).device
    return normalize(model.encode_image(images.to(device)).float(), dim=-1)


@dataclass(frozen=True)
class PatchPooling:
    """The patch tokens that `global_plus_local` adds to the embedding of an image.

    Patches are sampled with replacement. The sample depends on the seed and the key of the image alone. The values for
    each published model are in conf/eval/scenes.yaml. Source: see `global_plus_local`.

    Args:
        tokens: Number of patches, a share of all patches below 1, or None for every patch once.
        normalized: Whether every token is scaled to unit norm before the mean.
        seed: Seed of the samples.
    """

    tokens: int | float | None
    normalized: bool
    seed: int

    def __post_init__(self) -> None:
        if self.tokens is not None and not (0 < self.tokens < 1 or self.tokens == int(self.tokens) >= 1):
            raise ValueError(
                f"eval: local.tokens is {self.tokens}: set a count, a share below 1, or null for all patches."
            )

    def sample(self, key: str, patches: int) -> list[int]:
        """Return the indices of the patches that count, for the image with this key and this many patches."""
        if self.tokens is None:
            return list(range(patches))
        amount = int(self.tokens if self.tokens >= 1 else max(1, self.tokens * patches))
        return Random(f"{self.seed} {key}").choices(range(patches), k=amount)


def global_plus_local(
    pooled: Float[Tensor, "b d"], patches: Float[Tensor, "b m d"], normalized: bool
) -> Float[Tensor, "b d"]:
    """Return the image embedding plus the mean of patch tokens, scaled to unit norm.

    Prefer the score of the plain embedding, because applications of CLIP use the plain embedding. Scores of the two
    rules do not compare, and with sampled patches the score depends on the seed.

    Source: code of DIVA (arXiv 2407.20171), which scores the models of OpenAI and MetaCLIP and DFN's 378 px model on
    MMVP-VLM in this way.
    Departs: DIVA's samples have no seed, and its sums for DFN are not normalized before they are compared.

    Args:
        pooled: [b, d] plain image embeddings.
        patches: [b, m, d] patch tokens in the space of the embeddings.
        normalized: Whether every token and embedding is scaled to unit norm first.
    """
    if normalized:
        pooled, patches = normalize(pooled, dim=-1), normalize(patches, dim=-1)
    return normalize(pooled + patches.mean(dim=1), dim=-1)


def embed_with_patches(
    model: Model, images: Float[Tensor, "b 3 h w"], keys: Sequence[str], pooling: PatchPooling
) -> Float[Tensor, "b d"]:
    """Return the image embeddings of `global_plus_local`.

    Args:
        keys: The keys of the images, which seed the samples of patches.

    Raises:
        ValueError: The model has no patch tokens in the space of its embeddings.
    """
    device = next(model.parameters()).device
    if not isinstance(model, Patches):
        raise ValueError(
            f"{type(model).__name__} has no patch tokens: remove the benchmark that needs them, "
            "~eval.benchmarks.pairs_local or ~eval.benchmarks.mmvp_local."
        )
    try:
        pooled, patches = model.visual_tokens(images.to(device))
    except ValueError as error:
        raise ValueError(
            f"{error} Or remove the benchmark that needs patches: ~eval.benchmarks.pairs_local or "
            "~eval.benchmarks.mmvp_local."
        ) from error
    sampled = torch.tensor([pooling.sample(key, patches.shape[1]) for key in keys], device=device)
    return global_plus_local(pooled.float(), take_patches(patches, sampled).float(), pooling.normalized)


def embed_texts(model: Model, texts: list[str], at_most: int | None = None) -> Float[Tensor, "n d"]:
    """Return the plain text embeddings with unit norm. `at_most` truncates texts to that many tokens."""
    return normalize(model.encode_text(model.tokenize(texts, at_most)).float(), dim=-1)
