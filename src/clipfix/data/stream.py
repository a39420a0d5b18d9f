"""What one rank reads: an endless stream of shuffled passes over shards, sample by sample, and how samples are batched.

Shuffling happens on undecoded bytes and every random choice is a function of (seed, pass, sample), so a position (pass,
samples taken) says exactly where a worker stands.
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
from clipfix.data.stored import look_up, look_up_latent
from clipfix.data.texts import Text

log = logging.getLogger(__name__)

LOOK_AROUND = 1000  # broken samples in a row after which a worker asks whether any shard is fine


class Progress(TypedDict):
    """Where one rank stands, in plain types so that a checkpoint holding it loads with `weights_only`."""

    turn: int  # the worker whose batch comes next
    positions: list[list[int]]  # per worker: pass, and raw samples taken of that pass


def beginning(workers: int, number: int = 0) -> Progress:
    """The start of pass `number`; without worker processes the loader itself is the one worker."""
    return {"turn": 0, "positions": [[number, 0] for _ in range(max(workers, 1))]}


def share(shards: list[str], consumer: int, consumers: int) -> Iterator[dict[str, Any]]:
    """This consumer's part of one pass: whole shards if there is one for everybody, else every n-th sample of each."""
    if len(shards) >= consumers:
        return itertools.chain.from_iterable(map(read_shard, shards[consumer::consumers]))
    return itertools.chain.from_iterable(
        # shifted from shard to shard, so that remainders do not pile up on the first consumers
        itertools.islice(read_shard(shard), (consumer + place) % consumers, None, consumers)
        for place, shard in enumerate(shards)
    )


@dataclass(frozen=True)
class Decoder:
    """Turns the bytes of a sample into what a batch holds.

    Args:
        texts: by name, which text of a sample goes into the batch.
        image_size: side of the square image in pixels.
        seed: of the run. Random choices follow from (seed, pass, key of the sample).
        augment: a transform of the decoded picture (PIL), before it is resized and cropped; torchvision's, or another
            that draws from the global generators of torch, numpy or Python.
        features: member of the shards that holds stored features.
        latents: member of the shards that holds stored latents.
        latents_of: what these must be of (`Diffusion.latents_of`).
    """

    texts: Mapping[str, Text]
    image_size: int
    seed: int
    augment: Callable[[Image.Image], Image.Image] | None = None
    features: str | None = None
    latents: str | None = None
    latents_of: str | None = None

    def __call__(self, raw: Mapping[str, Any], number: int) -> dict[str, Any]:
        """Return a decoded sample of pass `number`; raise whatever broken bytes raise."""
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
            sample["features"] = look_up(raw, self.features, self.texts, texts)
        if self.latents is not None:
            sample["latents"] = look_up_latent(raw, self.latents, self.latents_of)
        return sample


@contextmanager
def seeded(text: str) -> Iterator[None]:
    """Seed the global generators by a text; they come back as they were."""
    number = int.from_bytes(blake2b(text.encode(), digest_size=4).digest())
    with isolate_rng(include_cuda=False):
        torch.random.default_generator.manual_seed(number)
        np.random.seed(number)
        random.seed(number)
        yield


class ShardStream(IterableDataset):
    """What one rank reads: endless shuffled passes from `progress` on, or one pass in stored order when it is None.

    `progress` is read anew whenever iteration starts. The loader takes worker 0 first, so the worker whose turn it is
    takes that place: a resumed run sees the batches that the interrupted one would have seen.
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
        start = self.progress or beginning(workers)
        worker, consumers = (slot + start["turn"]) % workers, self.world * workers
        first, taken = start["positions"][worker]
        skipped = 0
        for number in itertools.count(first):
            usable = 0
            raws = enumerate(self._raws(number, self.rank * workers + worker, consumers), start=1)
            for index, raw in itertools.islice(raws, taken, None):
                try:
                    sample = self.decoder(raw, number)
                except Exception as error:  # broken bytes raise anything
                    skipped += 1
                    log.debug("skipped %s in %s: %s", raw["__key__"], raw["__url__"], error)
                    if skipped % LOOK_AROUND == 0:
                        self._look_around(f"{skipped} in a row")
                    continue
                yield {**sample, "position": (worker, number, index), "skipped": skipped}
                usable, skipped = usable + 1, 0
            if not usable and not taken:
                self._look_around("a whole pass")
            if self.progress is None:
                return
            if not usable and not taken and len(self.shards) < consumers:  # it has read all of them, and will again
                raise ValueError(
                    f"data.train has too few usable samples for each of {consumers} workers to get one: lower "
                    "data.workers or the number of devices."
                )
            taken = 0

    def _look_around(self, vain: str) -> None:
        """Stops the run unless some shard begins with a usable sample; of the selection split, has one anywhere.

        A broken shard may be all that a pass gives a worker, and the next pass deals the shards anew: so a worker that
        reads in vain goes on as long as any shard is fine. No server is asked twice here, as that has been done.
        """
        split, most = ("data.train", 1) if self.progress else ("data.selection", None)
        faults: dict[str, Exception | str] = {"": f"{split} names none"}
        for shard in self.shards:
            faults = {shard: "it is empty"}
            for raw in itertools.islice(read_shard(shard, faults.__setitem__, again=0), most):
                try:
                    self.decoder(raw, number=0)
                    return
                except Exception as error:  # of this sample
                    faults[shard] = error
        ((last, reason),) = faults.items()
        begins = "begins with" if most else "has"
        raise ValueError(
            f"A worker found no usable sample in {vain}, and no shard of {split} ({len(self.shards)}) {begins} "
            f"one. The last, {last}: {reason}"
        )

    def _raws(self, number: int, consumer: int, consumers: int) -> Iterator[dict[str, Any]]:
        if self.progress is None:
            return share(self.shards, consumer, consumers)
        order = random.Random(f"{self.seed} {number}").sample(self.shards, len(self.shards))
        raws = share(order, consumer, consumers)
        if not self.shuffle:
            return raws
        rng = random.Random(f"{self.seed} {number} {consumer}")
        return wds.shuffle(self.shuffle, initial=self.shuffle, rng=rng)(raws)


def collate(batch: list[dict[str, Any]], encode: tuple[Encode, ...] = ()) -> dict[str, Any]:
    """Images stacked, in bytes; texts sample-major; `position` is where the worker stood after the last sample.

    What the functions of `encode` make of that joins the batch.
    """
    features: list[dict[str, Tensor]] = [sample["features"] for sample in batch if "features" in sample]
    joined = {name: torch.cat([found[name] for found in features]) for name in features[0]} if features else {}
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


def quiet_worker(_: int) -> None:
    """tokenizers would warn in every forked worker that it computes on one thread there, which is meant to be so."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
