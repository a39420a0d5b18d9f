"""What a score sees of a backbone: unit-norm fp32 features of whole shard sets and lists of texts.

Published scores seldom reproduce because half precision, autocast or a forgotten `train()` leaks into them. Everything
that could leak is shut out in one place, `scoring`; a benchmark only ever meets `Features`.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import torch
from jaxtyping import Float
from lightning.pytorch.utilities.seed import isolate_rng
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import normalize

from clipfix.backbone import Backbone, weights_hash
from clipfix.data import samples, square
from clipfix.functional.patches import take_patches
from clipfix.sets import Source

BATCH = 64  # a forward pass; memory depends on it, features do not

Sample = dict[str, Any]  # key, txt and json of one sample; its picture is not kept
TextCache = dict[tuple[str, int, str], Tensor]  # hash of the text tower, tokens at most, text -> its row, on the CPU
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


def embed_images(backbone: Backbone, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
    """The plain image embedding, unit norm."""
    device = next(backbone.parameters()).device
    return normalize(backbone.encode_image(images.to(device)).float(), dim=-1)


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
    backbone: Backbone, images: Float[Tensor, "b 3 h w"], keys: Sequence[str], local: Local
) -> Float[Tensor, "b d"]:
    """The image embedding by the rule of `global_plus_local`; `keys` name the pictures."""
    device = next(backbone.parameters()).device
    try:
        pooled, patches = backbone.visual_tokens(images.to(device))
    except ValueError as error:
        raise ValueError(
            f"{error} Or leave out the score that asks for patches: ~eval.benchmarks.pairs_local, or mmvp_local"
        ) from error
    drawn = torch.tensor([local.draw(key, patches.shape[1]) for key in keys], device=device)
    return global_plus_local(pooled.float(), take_patches(patches, drawn).float(), local.normalized)


def embed_texts(backbone: Backbone, texts: Sequence[str], at_most: int | None = None) -> Float[Tensor, "n d"]:
    """The plain text embedding, unit norm; equal strings get bit-equal rows, whichever batch they would have met.

    `at_most` cuts every text after so many tokens, where that is less than the context.
    """
    # Short texts first: a batch is as long as its longest text.
    unique = sorted(dict.fromkeys(texts), key=len)
    row = {text: i for i, text in enumerate(unique)}
    batches = [unique[i : i + BATCH] for i in range(0, len(unique), BATCH)]
    rows = torch.cat([backbone.encode_text(backbone.tokenize(batch, at_most)).float() for batch in batches])
    return normalize(rows, dim=-1)[[row[text] for text in texts]]


class Features:
    """The features of one backbone; what several benchmarks share, shards or picture files, is embedded once."""

    def __init__(self, backbone: Backbone, texts: TextCache | None = None) -> None:
        self.backbone = backbone
        self._texts: TextCache = {} if texts is None else texts
        # A cache of this backbone's own need not know whose texts it holds.
        self._tower = "" if texts is None else weights_hash(backbone.text)
        self._seen: dict[tuple[tuple[str, ...] | Source, Local | None], tuple[Tensor, list[Sample]]] = {}
        self._files: dict[tuple[Path, Local | None], Tensor] = {}  # of sources, which may share pictures

    def images(
        self, shards: Shards | None, allow_pipe: bool = False, local: Local | None = None
    ) -> tuple[Float[Tensor, "n d"], list[Sample]]:
        """One row per sample of the shards, and the samples, in stored order; by the plain rule, or with patches."""
        if not shards:
            raise ValueError(
                "There are no shards to score: name them (eval.shards=/path/to/test-*.tar) or set eval=none."
            )
        where = shards if isinstance(shards, Source) else (shards,) if isinstance(shards, str) else tuple(shards)
        if (where, local) not in self._seen:
            stream = iter(where) if isinstance(where, Source) else samples(where, allow_pipe)
            found, kept = self._embed(stream, local)
            if not kept:
                named = where.folder if isinstance(where, Source) else ", ".join(where)
                raise ValueError(f"No sample of {named} could be read: the log says why.")
            self._seen[where, local] = torch.stack(found), kept
        return self._seen[where, local]

    def texts(self, texts: Sequence[str], at_most: int | None = None) -> Float[Tensor, "n d"]:
        """One row per text, cut after `at_most` tokens if given; a text that was asked before is not embedded again."""
        cut = min(at_most or self.backbone.context_length, self.backbone.context_length)
        new = [text for text in dict.fromkeys(texts) if (self._tower, cut, text) not in self._texts]
        if new:
            rows = embed_texts(self.backbone, new, cut).cpu()
            self._texts |= {(self._tower, cut, text): row for text, row in zip(new, rows, strict=True)}
        stacked = torch.stack([self._texts[self._tower, cut, text] for text in texts])
        return stacked.to(next(self.backbone.parameters()).device)

    def _embed(self, stream: Iterator[Sample], local: Local | None) -> tuple[list[Tensor], list[Sample]]:
        """A row for each sample; a picture file that was embedded before is not opened again."""
        kept: list[Sample] = []
        names: list[Any] = []
        rows: dict[Any, Tensor] = {}

        def unseen() -> Iterator[tuple[Any, str, Image.Image | Path]]:
            for sample in stream:
                picture = sample.pop("image")
                name = (picture, local) if isinstance(picture, Path) else len(names)
                kept.append(sample)
                names.append(name)
                if name not in rows and name not in self._files:
                    rows[name] = torch.empty(0)  # it is in this batch
                    yield name, sample["key"], picture

        queue = unseen()
        while batch := list(islice(queue, BATCH)):
            images = torch.stack([square(decoded(picture), self.backbone.image_size) for _, _, picture in batch])
            if local is None:
                found = embed_images(self.backbone, images)
            else:
                found = embed_locally(self.backbone, images, [key for _, key, _ in batch], local)
            rows |= zip([name for name, _, _ in batch], found, strict=True)
        self._files |= {name: row for name, row in rows.items() if isinstance(name, tuple)}
        return [self._files[name] if isinstance(name, tuple) else rows[name] for name in names], kept


@contextmanager
def still(model: nn.Module) -> Iterator[None]:
    """The model in eval mode and without gradient; its training modes and all random states come back as they were.

    `no_grad` rather than `inference_mode`: what a model caches lazily must remain usable in training.
    """
    modes = [(module, module.training) for module in model.modules()]
    with isolate_rng(), torch.no_grad():
        try:
            model.eval()
            yield
        finally:
            for module, training in modes:
                module.training = training


@contextmanager
def scoring(backbone: Backbone, texts: TextCache | None = None) -> Iterator[Features]:
    """Features in fp32 from a still model: a run is bit-identical with and without the scores taken on its way.

    Precision settings come back as they were, like all that `still` minds.
    """
    matmul = torch.get_float32_matmul_precision()
    weights = [p for p in backbone.parameters() if p.is_floating_point()]
    with ExitStack() as stack:
        stack.enter_context(still(backbone))
        stack.enter_context(torch.autocast(weights[0].device.type, enabled=False))
        # TF32 keeps 10 bits of mantissa: fast in training, but it makes ties.
        stack.enter_context(torch.backends.cudnn.flags(enabled=True, allow_tf32=False))
        stack.callback(torch.set_float32_matmul_precision, matmul)
        torch.set_float32_matmul_precision("highest")
        # Weights held in half precision are scored through an fp32 copy.
        if any(p.dtype != torch.float32 for p in weights):
            backbone = copy.deepcopy(backbone).float()
        yield Features(backbone, texts)
