"""Features of a model for benchmarks: unit norm, fp32, for whole sets of shards and lists of texts.

Half precision, autocast or a forgotten `train()` change scores. `scoring` excludes all of them in one place, and a
benchmark reads features only through `Features`. With several ranks, each embeds a part and all get all features.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain, count, islice
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Float
from lightning.pytorch.utilities.seed import isolate_rng
from PIL import Image
from torch import Tensor, nn

from clipfix.data.decoding import readable, square, undecoded
from clipfix.data.sets import Source
from clipfix.evals.embed import (
    BATCH,
    PatchPooling,
    Sample,
    Shards,
    apart,
    embed_images,
    embed_texts,
    embed_with_patches,
    load_rgb,
)
from clipfix.models.base import Model
from clipfix.models.clip import weights_hash
from clipfix.system.ranks import rank_of
from clipfix.training.precision import fp32_products

TextCache = dict[tuple[str, int, str], Tensor]  # {(hash of the text tower, maximum tokens, text): feature on the CPU}
Item = TypeVar("Item")
Result = TypeVar("Result")


def split_over_ranks(items: Iterable[Item], work: Callable[[list[Item]], Result]) -> list[Result]:
    """Return the results of `work` for every batch of items. Batches are assigned to ranks in turn; all ranks get all.

    A batch holds the same items at any number of ranks, so features do not depend on the number of ranks. An error on
    one rank is raised on all of them, so that none waits for another.

    Args:
        items: The same items on every rank.
        work: A function of at most `BATCH` items; its result must be picklable.
    """
    rank, ranks = rank_of()
    results: list[Result] = []
    failure = None
    stream = iter(items)
    try:
        for number in count():
            if not (batch := list(islice(stream, BATCH))):
                break
            if number % ranks == rank:
                results.append(work(batch))
    except ValueError as error:
        failure = error
    if ranks == 1:
        if failure:
            raise failure
        return results
    gathered: list[Any] = [None] * ranks
    dist.all_gather_object(gathered, (results, failure))
    for _, error_of_rank in gathered:
        if error_of_rank:
            raise error_of_rank
    batches = sum(len(of_rank) for of_rank, _ in gathered)
    return [gathered[i % ranks][0][i // ranks] for i in range(batches)]


class Features:
    """The features of one model. Shards and image files that several benchmarks share are embedded once.

    Args:
        model: The model, in eval mode and fp32; `scoring` sets this up.
        texts: A cache of text features to read and extend; a new one if None.
    """

    def __init__(self, model: Model, texts: TextCache | None = None) -> None:
        self.model = model
        self._texts: TextCache = {} if texts is None else texts
        # Only a cache that outlives this object needs the hash of the text tower.
        self._tower = "" if texts is None else weights_hash(model.text)
        self._embedded: dict[tuple[tuple[str, ...] | Source, PatchPooling | None], tuple[Tensor, list[Sample]]] = {}
        self._files: dict[tuple[Path, PatchPooling | None], Tensor] = {}  # data sets may share image files

    def images(
        self, shards: Shards | None, allow_pipe: bool = False, pooling: PatchPooling | None = None
    ) -> tuple[Float[Tensor, "n d"], list[Sample]]:
        """Return the image features of all samples, and the samples without their images, in stored order.

        Args:
            shards: Urls, or a published data set.
            allow_pipe: Whether urls may run commands.
            pooling: Patch tokens to add; None for the plain embedding.

        Raises:
            ValueError: There are no shards, or no sample in them can be read.
        """
        if not shards:
            raise ValueError("eval.shards is not set: set eval.shards=/path/to/test-*.tar, or eval=none.")
        data = shards if isinstance(shards, Source) else (shards,) if isinstance(shards, str) else tuple(shards)
        if (data, pooling) not in self._embedded:
            if isinstance(data, Source):
                rows, samples = self._embed_source(data, pooling)
            else:
                rows, samples = self._embed_shards(data, allow_pipe, pooling)
            if not samples:
                name = data.folder if isinstance(data, Source) else ", ".join(data)
                raise ValueError(f"No sample of {name} could be read. The log gives the reasons.")
            self._embedded[data, pooling] = torch.stack(rows).to(self._device), list(apart(samples))
        return self._embedded[data, pooling]

    def texts(self, texts: Sequence[str], at_most: int | None = None) -> Float[Tensor, "n d"]:
        """Return one feature per text, truncated to `at_most` tokens. Texts embedded before are reused."""
        cut = min(at_most or self.model.context_length, self.model.context_length)
        new = [text for text in dict.fromkeys(texts) if (self._tower, cut, text) not in self._texts]
        # Texts of similar length share a batch, because a batch is as long as its longest text.
        new.sort(key=len)
        if new:  # the same on all ranks, so either all or none take part in the collective operation
            rows = chain.from_iterable(split_over_ranks(new, lambda batch: embed_texts(self.model, batch, cut).cpu()))
            self._texts |= {(self._tower, cut, text): row for text, row in zip(new, rows, strict=True)}
        return torch.stack([self._texts[self._tower, cut, text] for text in texts]).to(self._device)

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _embed(
        self, images: Sequence[Image.Image | Path], keys: Sequence[str], pooling: PatchPooling | None
    ) -> Float[Tensor, "b d"]:
        """Return one feature per image, on the CPU, where ranks can exchange them."""
        pixels = torch.stack([square(load_rgb(image), self.model.image_size) for image in images])
        if pooling is None:
            return embed_images(self.model, pixels).cpu()
        return embed_with_patches(self.model, pixels, keys, pooling).cpu()

    def _embed_shards(
        self, urls: Sequence[str], allow_pipe: bool, pooling: PatchPooling | None
    ) -> tuple[list[Tensor], list[Sample]]:
        """Return one feature per sample that can be decoded. Every rank reads all bytes and decodes its batches."""

        def work(raws: list[dict[str, Any]]) -> tuple[Tensor, list[Sample]]:
            samples = list(readable(raws))
            images, keys = [sample.pop("image") for sample in samples], [sample["key"] for sample in samples]
            return self._embed(images, keys, pooling) if samples else torch.empty(0), samples

        batches = split_over_ranks(undecoded(urls, allow_pipe), work)
        return [row for rows, _ in batches for row in rows], [sample for _, samples in batches for sample in samples]

    def _embed_source(self, source: Source, pooling: PatchPooling | None) -> tuple[list[Tensor], list[Sample]]:
        """Return one feature per sample. An image file that was embedded before is not read again."""
        samples: list[Sample] = []
        ids: list[Any] = []  # of every sample: its file and the pooling, or a number for an image without a file
        new_ids: list[Any] = []
        seen: set[Any] = set(self._files)

        def new_images() -> Iterator[tuple[str, Image.Image | Path]]:
            for sample in source:
                image = sample.pop("image")
                id_ = (image, pooling) if isinstance(image, Path) else len(ids)
                samples.append(sample)
                ids.append(id_)
                if id_ not in seen:
                    seen.add(id_)
                    new_ids.append(id_)
                    yield sample["key"], image

        def work(batch: list[tuple[str, Image.Image | Path]]) -> Tensor:
            return self._embed([image for _, image in batch], [key for key, _ in batch], pooling)

        rows = dict(zip(new_ids, chain.from_iterable(split_over_ranks(new_images(), work)), strict=True))
        self._files |= {id_: row for id_, row in rows.items() if isinstance(id_, tuple)}
        return [self._files[id_] if isinstance(id_, tuple) else rows[id_] for id_ in ids], samples


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put a model in eval mode without gradients. Training modes and random states are restored at the end.

    `no_grad` is used instead of `inference_mode`, because tensors that a model caches must remain usable in training.
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
def scoring(model: Model, texts: TextCache | None = None) -> Iterator[Features]:
    """Yield features of a model in eval mode and fp32. Training continues with the same bits as without the scoring.

    Precision settings, training modes and random states are restored at the end.
    """
    weights = [p for p in model.parameters() if p.is_floating_point()]
    with ExitStack() as stack:
        stack.enter_context(eval_mode(model))
        stack.enter_context(torch.autocast(weights[0].device.type, enabled=False))
        # TF32 has a mantissa of 10 bits, which makes ties of scores that differ.
        stack.enter_context(torch.backends.cudnn.flags(enabled=True, allow_tf32=False))
        stack.enter_context(fp32_products("highest"))
        # A model with weights in half precision is scored by an fp32 copy.
        if any(p.dtype != torch.float32 for p in weights):
            model = copy.deepcopy(model).float()
        yield Features(model, texts)
