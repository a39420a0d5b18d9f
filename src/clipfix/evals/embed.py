"""What a score sees of a backbone: unit-norm fp32 features of whole shard sets and lists of texts.

Published scores seldom reproduce because half precision, autocast or a forgotten `train()` leaks into them. Everything
that could leak is shut out in one place, `scoring`; a benchmark only ever meets `Features`.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import islice
from typing import Any

import torch
from jaxtyping import Float
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.nn.functional import normalize

from clipfix.backbone import Backbone
from clipfix.data import samples, square

BATCH = 64  # a forward pass; memory depends on it, features do not

Sample = dict[str, Any]  # key, txt and json of one sample; its picture is not kept


def embed_images(backbone: Backbone, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
    """The plain image embedding, unit norm."""
    device = next(backbone.parameters()).device
    return normalize(backbone.encode_image(images.to(device)).float(), dim=-1)


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
    """The features of one backbone; shards that several benchmarks share are decoded and embedded once."""

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone
        self._seen: dict[tuple[str, ...], tuple[Tensor, list[Sample]]] = {}

    def images(
        self, shards: str | Sequence[str] | None, allow_pipe: bool = False
    ) -> tuple[Float[Tensor, "n d"], list[Sample]]:
        """One row per sample of the shards, and the samples, in stored order."""
        if not shards:
            raise ValueError(
                "There are no shards to score: name them (eval.shards=/path/to/test-*.tar) or set eval=none."
            )
        urls = (shards,) if isinstance(shards, str) else tuple(shards)
        if urls not in self._seen:
            self._seen[urls] = self._embed(urls, allow_pipe)
        return self._seen[urls]

    def texts(self, texts: Sequence[str], at_most: int | None = None) -> Float[Tensor, "n d"]:
        """One row per text, cut after `at_most` tokens if given."""
        return embed_texts(self.backbone, texts, at_most)

    def _embed(self, urls: tuple[str, ...], allow_pipe: bool) -> tuple[Float[Tensor, "n d"], list[Sample]]:
        rows: list[Tensor] = []
        kept: list[Sample] = []
        stream = samples(urls, allow_pipe)
        while batch := list(islice(stream, BATCH)):
            images = torch.stack([square(sample.pop("image"), self.backbone.image_size) for sample in batch])
            rows.append(embed_images(self.backbone, images))
            kept += batch
        if not rows:
            raise ValueError(f"No sample of {', '.join(urls)} could be read: the log says why.")
        return torch.cat(rows), kept


@contextmanager
def scoring(backbone: Backbone) -> Iterator[Features]:
    """Features in fp32 from a still model: a run is bit-identical with and without the scores taken on its way.

    Random states, training modes and precision settings come back as they were. `no_grad` rather than
    `inference_mode`: what a model caches lazily must remain usable in training.
    """
    modes = [(module, module.training) for module in backbone.modules()]
    matmul = torch.get_float32_matmul_precision()
    weights = [p for p in backbone.parameters() if p.is_floating_point()]
    with ExitStack() as stack:
        stack.enter_context(isolate_rng())
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.autocast(weights[0].device.type, enabled=False))
        # TF32 keeps 10 bits of mantissa: fast in training, but it makes ties.
        stack.enter_context(torch.backends.cudnn.flags(enabled=True, allow_tf32=False))
        stack.callback(torch.set_float32_matmul_precision, matmul)
        torch.set_float32_matmul_precision("highest")
        for module, training in modes:
            stack.callback(setattr, module, "training", training)
        # Weights held in half precision are scored through an fp32 copy.
        if any(p.dtype != torch.float32 for p in weights):
            backbone = copy.deepcopy(backbone).float()
        yield Features(backbone.eval())
