"""What a score sees of a model: unit-norm fp32 features of whole shard sets and lists of texts.

Published scores seldom reproduce because half precision, autocast or a forgotten `train()` leaks into them. Everything
that could leak is shut out in one place, `scoring`; a benchmark only ever meets `Features`. Where several ranks score,
each embeds its share and all get the whole.
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
from clipfix.evals.embed import BATCH, Local, Sample, Shards, decoded, embed_images, embed_locally, embed_texts
from clipfix.models.base import Model
from clipfix.models.clip import weights_hash
from clipfix.system.ranks import rank_of
from clipfix.training.precision import fp32_products

TextCache = dict[tuple[str, int, str], Tensor]  # hash of the text tower, tokens at most, text -> its row, on the CPU
Item = TypeVar("Item")
Made = TypeVar("Made")


def shared_out(items: Iterable[Item], work: Callable[[list[Item]], Made]) -> list[Made]:
    """What `work` makes of every batch of items, the batches dealt out to the ranks in turn; the same on every rank.

    A batch holds the same items at any number of ranks, the last one what is left, so its features have the same bits.
    What `work` raises on one rank is raised on all, and none waits for another that has given up.
    """
    rank, ranks = rank_of()
    mine: list[Made] = []
    failure = None
    stream = iter(items)
    try:
        for number in count():
            if not (batch := list(islice(stream, BATCH))):
                break
            if number % ranks == rank:
                mine.append(work(batch))
    except ValueError as error:
        failure = error
    if ranks == 1:
        if failure:
            raise failure
        return mine
    everyone: list[Any] = [None] * ranks
    dist.all_gather_object(everyone, (mine, failure))
    for _, failed in everyone:
        if failed:
            raise failed
    return [everyone[i % ranks][0][i // ranks] for i in range(sum(len(made) for made, _ in everyone))]


class Features:
    """The features of one model; what several benchmarks share, shards or picture files, is embedded once."""

    def __init__(self, model: Model, texts: TextCache | None = None) -> None:
        self.model = model
        self._texts: TextCache = {} if texts is None else texts
        # A cache of this model's own need not know whose texts it holds.
        self._tower = "" if texts is None else weights_hash(model.text)
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
            if isinstance(where, Source):
                rows, kept = self._of_source(where, local)
            else:
                rows, kept = self._of_shards(where, allow_pipe, local)
            if not kept:
                named = where.folder if isinstance(where, Source) else ", ".join(where)
                raise ValueError(f"No sample of {named} could be read: the log says why.")
            self._seen[where, local] = torch.stack(rows).to(self._device), kept
        return self._seen[where, local]

    def texts(self, texts: Sequence[str], at_most: int | None = None) -> Float[Tensor, "n d"]:
        """One row per text, cut after `at_most` tokens if given; a text that was asked before is not embedded again."""
        cut = min(at_most or self.model.context_length, self.model.context_length)
        new = [text for text in dict.fromkeys(texts) if (self._tower, cut, text) not in self._texts]
        # Short texts first: a batch is as long as its longest text.
        new.sort(key=len)
        if new:  # ranks meet to share the work: none is needed where all know all
            rows = chain.from_iterable(shared_out(new, lambda batch: embed_texts(self.model, batch, cut).cpu()))
            self._texts |= {(self._tower, cut, text): row for text, row in zip(new, rows, strict=True)}
        return torch.stack([self._texts[self._tower, cut, text] for text in texts]).to(self._device)

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _embed(
        self, found: Sequence[Image.Image | Path], keys: Sequence[str], local: Local | None
    ) -> Float[Tensor, "b d"]:
        """A row for each picture, on the CPU, where ranks can exchange it."""
        images = torch.stack([square(decoded(picture), self.model.image_size) for picture in found])
        if local is None:
            return embed_images(self.model, images).cpu()
        return embed_locally(self.model, images, keys, local).cpu()

    def _of_shards(
        self, urls: Sequence[str], allow_pipe: bool, local: Local | None
    ) -> tuple[list[Tensor], list[Sample]]:
        """A row for each sample that can be decoded, which is the dear part: every rank reads all bytes."""

        def work(raws: list[dict[str, Any]]) -> tuple[Tensor, list[Sample]]:
            kept = list(readable(raws))
            found = [sample.pop("image") for sample in kept]
            return self._embed(found, [sample["key"] for sample in kept], local) if kept else torch.empty(0), kept

        made = shared_out(undecoded(urls, allow_pipe), work)
        return [row for rows, _ in made for row in rows], [sample for _, kept in made for sample in kept]

    def _of_source(self, source: Source, local: Local | None) -> tuple[list[Tensor], list[Sample]]:
        """A row for each sample; a picture file that was embedded before is not opened again."""
        kept: list[Sample] = []
        names: list[Any] = []
        asked: list[Any] = []
        known: set[Any] = set(self._files)

        def unseen() -> Iterator[tuple[str, Image.Image | Path]]:
            for sample in source:
                picture = sample.pop("image")
                name = (picture, local) if isinstance(picture, Path) else len(names)
                kept.append(sample)
                names.append(name)
                if name not in known:
                    known.add(name)
                    asked.append(name)
                    yield sample["key"], picture

        def work(batch: list[tuple[str, Image.Image | Path]]) -> Tensor:
            return self._embed([picture for _, picture in batch], [key for key, _ in batch], local)

        made = dict(zip(asked, chain.from_iterable(shared_out(unseen(), work)), strict=True))
        self._files |= {name: row for name, row in made.items() if isinstance(name, tuple)}
        return [self._files[name] if isinstance(name, tuple) else made[name] for name in names], kept


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
def scoring(model: Model, texts: TextCache | None = None) -> Iterator[Features]:
    """Features in fp32 from a still model: a run is bit-identical with and without the scores taken on its way.

    Precision settings come back as they were, like all that `still` minds.
    """
    weights = [p for p in model.parameters() if p.is_floating_point()]
    with ExitStack() as stack:
        stack.enter_context(still(model))
        stack.enter_context(torch.autocast(weights[0].device.type, enabled=False))
        # TF32 keeps 10 bits of mantissa: fast in training, but it makes ties.
        stack.enter_context(torch.backends.cudnn.flags(enabled=True, allow_tf32=False))
        stack.enter_context(fp32_products("highest"))
        # Weights held in half precision are scored through an fp32 copy.
        if any(p.dtype != torch.float32 for p in weights):
            model = copy.deepcopy(model).float()
        yield Features(model, texts)
