"""Pictures and texts to unit-norm fp32 features, a batch at a time, by the plain rule or with patches joined to it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from clipfix.data.decoding import samples
from clipfix.data.sets import Source
from clipfix.functional.patches import take_patches
from clipfix.models.base import Model, Patches

BATCH = 64  # a forward pass; memory depends on it, features do not

Sample = dict[str, Any]  # key, txt and json of one sample; its picture is not kept
Shards = str | Sequence[str] | Source  # what a benchmark reads: urls, or a published data set


def pictures(shards: Shards, allow_pipe: bool = False) -> Iterator[Sample]:
    """One pass of samples with their pictures, for looking at them."""
    for sample in shards if isinstance(shards, Source) else samples(shards, allow_pipe):
        yield {**sample, "image": decoded(sample["image"])}


def decoded(image: Image.Image | Path) -> Image.Image:
    """A picture in RGB, from its file if need be. Of a published set none may fail: it would be another set."""
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    try:
        with Image.open(image) as opened:
            return opened.convert("RGB")
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"the picture {image} cannot be read ({error}): fetch its data set again.") from error


def embed_images(model: Model, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
    """The plain image embedding, unit norm."""
    device = next(model.parameters()).device
    return normalize(model.encode_image(images.to(device)).float(), dim=-1)


@dataclass(frozen=True)
class Local:
    """Which patches of a picture join its embedding: `tokens` of them, a share below 1 of them, or null for each.

    Patches are drawn with replacement, by seed and picture alone: whatever the batch, whoever asks. `normalized` says
    whether every token has unit norm before the mean. Source: as `global_plus_local`, whose table of models is in
    conf/eval/scenes.yaml.
    """

    tokens: int | float | None
    normalized: bool
    seed: int

    def __post_init__(self) -> None:
        if self.tokens is not None and not (0 < self.tokens < 1 or self.tokens == int(self.tokens) >= 1):
            raise ValueError(f"eval: local.tokens is {self.tokens}: give a number, a share below 1, or null for all.")

    def draw(self, key: str, patches: int) -> list[int]:
        """The patches that count of the picture with this key."""
        if self.tokens is None:
            return list(range(patches))
        amount = int(self.tokens if self.tokens >= 1 else max(1, self.tokens * patches))
        return Random(f"{self.seed} {key}").choices(range(patches), k=amount)


def global_plus_local(
    pooled: Float[Tensor, "b d"], patches: Float[Tensor, "b m d"], normalized: bool
) -> Float[Tensor, "b d"]:
    """The image embedding plus the mean of patch tokens, of unit norm. The score to trust is the plain embedding's.

    Whoever uses a CLIP reads its plain embedding, and nothing but this score ever sees the sum; the numbers of the two
    rules do not compare, and with drawn patches they change from draw to draw.

    Source: code of DIVA (arXiv 2407.20171), which scores OpenAI's, MetaCLIP's and DFN's 378 px models so on MMVP-VLM.
    Departs: there the draws have no seed, and DFN's sums keep their norm, by which it compares them as well.
    """
    if normalized:
        pooled, patches = normalize(pooled, dim=-1), normalize(patches, dim=-1)
    return normalize(pooled + patches.mean(dim=1), dim=-1)


def embed_locally(
    model: Model, images: Float[Tensor, "b 3 h w"], keys: Sequence[str], local: Local
) -> Float[Tensor, "b d"]:
    """The image embedding by the rule of `global_plus_local`; `keys` name the pictures."""
    device = next(model.parameters()).device
    if not isinstance(model, Patches):
        raise ValueError(
            f"{type(model).__name__} has no patch tokens: leave out the score that needs them, "
            "~eval.benchmarks.pairs_local or mmvp_local."
        )
    try:
        pooled, patches = model.visual_tokens(images.to(device))
    except ValueError as error:
        raise ValueError(
            f"{error} Or leave out the score that asks for patches: ~eval.benchmarks.pairs_local, or mmvp_local"
        ) from error
    drawn = torch.tensor([local.draw(key, patches.shape[1]) for key in keys], device=device)
    return global_plus_local(pooled.float(), take_patches(patches, drawn).float(), local.normalized)


def embed_texts(model: Model, texts: list[str], at_most: int | None = None) -> Float[Tensor, "n d"]:
    """The plain text embedding, unit norm; `at_most` cuts every text after so many tokens, if that is less."""
    return normalize(model.encode_text(model.tokenize(texts, at_most)).float(), dim=-1)
