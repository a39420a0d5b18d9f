"""The stream of samples of one rank, in endless shuffled passes over the shards, and their collation to batches.

Samples are shuffled undecoded, and each random choice is a function of (seed, pass, sample). So the position of a
worker is the pair (pass, samples taken).
"""

import itertools
import logging
import os
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, TypedDict

import numpy as np
import torch
import webdataset as wds
from lightning.pytorch.utilities.seed import isolate_rng
from PIL import Image
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info
from torchvision.transforms import functional as tvf

from clipfix.data.decoding import cropped, decode
from clipfix.data.needs import Encode
from clipfix.data.shards import read_shard
from clipfix.data.stored import stored_features, stored_latent
from clipfix.data.texts import Text

log = logging.getLogger(__name__)

CHECK_AFTER = 1000  # broken samples in a row after which a worker checks whether any shard is readable


class Progress(TypedDict):
    """The position of one rank, in plain types, so that a checkpoint with it loads with `weights_only`."""

    turn: int  # index of the worker whose batch is next
    positions: list[list[int]]  # for each worker: pass, and undecoded samples taken in that pass


def start_of_pass(workers: int, number: int = 0) -> Progress:
    """Return the position at the start of pass `number`. With 0 workers the loader itself counts as one."""
    return {"turn": 0, "positions": [[number, 0] for _ in range(max(workers, 1))]}


def split_over_consumers(shards: list[str], consumer: int, consumers: int) -> Iterator[dict[str, Any]]:
    """Yield the samples of one consumer in one pass.

    If there are at least as many shards as consumers, it gets entire shards. Otherwise it gets every n-th sample of
    each shard.
    """
    if len(shards) >= consumers:
        return itertools.chain.from_iterable(map(read_shard, shards[consumer::consumers]))
    return itertools.chain.from_iterable(
        # shift by one for each shard, so that the first consumers do not get all remainders
        itertools.islice(read_shard(shard), (consumer + place) % consumers, None, consumers)
        for place, shard in enumerate(shards)
    )


@dataclass(frozen=True)
class Decoder:
    """Decodes the bytes of a sample to the entries of a batch.

    Args:
        texts: settings of the texts by name.
        image_size: side of the square image in pixels.
        seed: seed of the run. Random choices follow from (seed, pass, key of the sample).
        augment: transform of the decoded picture (PIL), before it is resized and cropped. It may use the global random
            generators of torch, numpy or Python, as those of torchvision do.
        features: member of the shards that holds stored features.
        latents: member of the shards that holds stored latents.
        latents_of: the expected identity of their autoencoder (`Diffusion.latents_of`).
    """

    texts: Mapping[str, Text]
    image_size: int
    seed: int
    augment: Callable[[Image.Image], Image.Image] | None = None
    features: str | None = None
    latents: str | None = None
    latents_of: str | None = None

    def __call__(self, raw: Mapping[str, Any], number: int) -> dict[str, Any]:
        """Return a decoded sample of pass `number`; broken bytes raise various exceptions."""
        sample = decode(raw)
        texts = {
            name: text.draw(sample, random.Random(f"{self.seed} {number} {sample['key']} {name}"))
            for name, text in self.texts.items()
        }
        picture = sample["image"]
        if self.augment is not None:
            with seeded(f"{self.seed} {number} {sample['key']} augment"):
                picture = self.augment(picture)
        sample = {
            "key": sample["key"],
            "image": tvf.pil_to_tensor(cropped(picture, self.image_size)),
            "texts": texts,
        }
        if self.features is not None:
            sample["features"] = stored_features(raw, self.features, self.texts, texts)
        if self.latents is not None:
            sample["latents"] = stored_latent(raw, self.latents, self.latents_of)
        return sample


@contextmanager
def seeded(text: str) -> Iterator[None]:
    """Seed the global random generators with a text within the block, and restore their states after it."""
    number = int.from_bytes(blake2b(text.encode(), digest_size=4).digest())
    with isolate_rng(include_cuda=False):
        torch.random.default_generator.manual_seed(number)
        np.random.seed(number)
        random.seed(number)
        yield


class ShardStream(IterableDataset):
    """The samples of one rank: endless shuffled passes from `progress` on, or one pass in stored order if it is None.

    `progress` is read whenever iteration starts. The loader always starts with worker 0, so worker 0 continues as the
    worker whose turn it is. A resumed run gets the batches that the interrupted run would have got.

    Args:
        shards: one url for each shard.
        decoder: decodes samples.
        shuffle: samples in the shuffle buffer; 0 shuffles the shards alone.
        rank: index of this rank.
        world: number of ranks.
        progress: position of this rank.
    """

    def __init__(
        self,
        shards: list[str],
        decoder: Decoder,
        shuffle: int,
        rank: int,
        world: int,
        progress: Progress | None,
    ) -> None:
        self.shards, self.decoder, self.seed = shards, decoder, decoder.seed
        self.shuffle, self.rank, self.world, self.progress = shuffle, rank, world, progress

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        slot, workers = (info.id, info.num_workers) if info else (0, 1)
        start = self.progress or start_of_pass(workers)
        worker, consumers = (slot + start["turn"]) % workers, self.world * workers
        first, taken = start["positions"][worker]
        skipped = 0
        for number in itertools.count(first):
            usable = 0
            raws = enumerate(self._raws(number, self.rank * workers + worker, consumers), start=1)
            for index, raw in itertools.islice(raws, taken, None):
                try:
                    sample = self.decoder(raw, number)
                except Exception as error:  # broken bytes raise various exceptions
                    skipped += 1
                    log.debug("skipped %s in %s: %s", raw["__key__"], raw["__url__"], error)
                    if skipped % CHECK_AFTER == 0:
                        self._check_shards(f"{skipped} in a row")
                    continue
                yield {**sample, "position": (worker, number, index), "skipped": skipped}
                usable, skipped = usable + 1, 0
            if not usable and not taken:
                self._check_shards("an entire pass")
            if self.progress is None:
                return
            if not usable and not taken and len(self.shards) < consumers:  # each pass gives it the same samples
                raise ValueError(
                    f"data.train has too few usable samples for {consumers} workers: lower data.workers or the number "
                    "of devices."
                )
            taken = 0

    def _check_shards(self, extent: str) -> None:
        split, most = ("data.train", 1) if self.progress else ("data.selection", None)
        check_usable(self.shards, self.decoder, split, extent, most)

    def _raws(self, number: int, consumer: int, consumers: int) -> Iterator[dict[str, Any]]:
        if self.progress is None:
            return split_over_consumers(self.shards, consumer, consumers)
        order = random.Random(f"{self.seed} {number}").sample(self.shards, len(self.shards))
        raws = split_over_consumers(order, consumer, consumers)
        if not self.shuffle:
            return raws
        rng = random.Random(f"{self.seed} {number} {consumer}")
        return wds.shuffle(self.shuffle, initial=self.shuffle, rng=rng)(raws)


def check_usable(
    shards: list[str], decoder: Callable[[Mapping[str, Any], int], Any], split: str, extent: str, most: int | None = 1
) -> None:
    """Raise ValueError unless one of the first `most` samples of some shard is usable; None looks at all samples.

    A pass may assign only a broken shard to a worker, and the next pass assigns others. So a worker without usable
    samples continues as long as any shard is readable. Requests to servers are not repeated here, because reading
    has repeated them before.
    """
    faults: dict[str, Exception | str] = {"": f"{split} names no shard"}
    for shard in shards:
        faults = {shard: "it is empty"}
        for raw in itertools.islice(read_shard(shard, faults.__setitem__, again=0), most):
            try:
                decoder(raw, 0)
                return
            except Exception as error:
                faults[shard] = error
    ((last, reason),) = faults.items()
    begins = "begins with" if most else "has"
    raise ValueError(
        f"A worker found no usable sample in {extent}, and no shard of {split} ({len(shards)}) {begins} one. The last, "
        f"{last}: {reason}"
    )


def collate(batch: list[dict[str, Any]], encode: tuple[Encode, ...] = ()) -> dict[str, Any]:
    """Collate decoded samples to a batch.

    Args:
        encode: functions that return further entries of the collated batch.

    Returns:
        `image` [b, 3, s, s] in bytes; a list of b * k texts for each name, with those of one sample next to each other;
        `key`; `position`, that of the last sample; `skipped`, the number of broken samples;
        and the entries of `encode`.
    """
    features: list[dict[str, Tensor]] = [sample["features"] for sample in batch if "features" in sample]
    joined = {name: torch.cat([sample[name] for sample in features]) for name in features[0]} if features else {}
    latents: list[Tensor] = [sample["latents"] for sample in batch if "latents" in sample]
    joined_batch = {
        "key": [sample["key"] for sample in batch],
        "image": torch.stack([sample["image"] for sample in batch]),
        "position": batch[-1]["position"],
        "skipped": sum(sample["skipped"] for sample in batch),
        **{name: [text for sample in batch for text in sample["texts"][name]] for name in batch[0]["texts"]},
        **({"features": joined} if features else {}),
        **({"latents": torch.stack(latents)} if latents else {}),
    }
    for function in encode:
        joined_batch |= function(joined_batch)
    return joined_batch


def init_worker(_: int) -> None:
    """Set tokenizers to one thread, as intended in a worker; otherwise it prints a warning in each forked process."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
