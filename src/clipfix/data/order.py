"""The order of training samples, a function of (seed, pass, place), and the stream of one rank in that order.

The joined batch of step n is the same on any number of ranks and workers, because each of them computes which samples
it delivers and reads no others. One number is the whole position of a run: the samples that all ranks together have
been given. This needs an index of the shards (`index.py`). Other shards are streamed by `stream.py`.
"""

import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, TypedDict

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from clipfix.data import stream
from clipfix.data.index import Index

STRIPES = 16  # parts of a pass that are read side by side
RUN = 64  # samples in a row that a window reads of each stripe, at least; also those read at once without shuffling


class Place(TypedDict):
    """The position of all ranks, in plain types, so that a checkpoint with it loads with `weights_only`."""

    number: int  # samples given to all ranks together, since the beginning of training; broken ones are counted
    samples: int  # samples of a pass


class Order:
    """The order in which passes take the samples of shards.

    A pass puts the shards into a random order and cuts the row of all samples into stripes of equal length, whatever
    the sizes of the shards. It takes one sample of each stripe in turn. The result is cut into windows of `shuffle`
    samples, and each is shuffled. So a window holds a short run of samples of each stripe.

    Args:
        first: number of the first sample of each shard, and the number of all samples.
        seed: seed of the run.
        shuffle: samples in a window; 0 shuffles the shards alone, and keeps the order within them.
    """

    def __init__(self, first: Sequence[int] | np.ndarray, seed: int, shuffle: int) -> None:
        self.first, self.seed, self.shuffle = np.asarray(first, np.int64), seed, shuffle
        self.samples, self.width = int(self.first[-1]), shuffle or RUN
        self.stripes = max(1, min(STRIPES, shuffle // RUN))
        self._shards = lru_cache(2)(self._shards_of_pass)
        self._windows = lru_cache(2)(self._window)

    def __getstate__(self) -> tuple[np.ndarray, int, int]:
        return self.first, self.seed, self.shuffle  # caches cannot be sent to a worker

    def __setstate__(self, state: tuple[np.ndarray, int, int]) -> None:
        self.__init__(*state)  # type: ignore[misc]

    def __call__(self, number: int, place: int) -> int:
        """Return which sample, numbered in stored order, is at a place of pass `number`."""
        return self._windows(number, place // self.width)[place % self.width]

    def _window(self, number: int, window: int) -> list[int]:
        """Return the samples of a window. Each worker computes all windows, so it has to be fast."""
        start = window * self.width
        row, stripe = np.divmod(np.arange(start, min(start + self.width, self.samples)), self.stripes)
        each, longer = divmod(self.samples, self.stripes)  # the first `longer` stripes have one sample more
        at = stripe * each + np.minimum(stripe, longer) + row
        shards, ends = self._shards(number)
        turn = np.searchsorted(ends, at, side="right")
        samples = self.first[shards[turn] + 1] - (ends[turn] - at)
        if self.shuffle:
            samples = samples[self._draws(number, 1, window).permutation(len(samples))]
        return samples.tolist()

    def _shards_of_pass(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the shards in the order of a pass, and how many samples there are up to the end of each."""
        shards = self._draws(number, 0).permutation(len(self.first) - 1)
        return shards, np.cumsum(np.diff(self.first)[shards])

    def _draws(self, *key: int) -> np.random.RandomState:
        """Return a random generator for a key. numpy promises that RandomState draws the same in all versions."""
        return np.random.RandomState(np.random.MT19937(np.random.SeedSequence([self.seed % 2**63, *key])))


class OrderedStream(IterableDataset):
    """The samples of one rank: its part of each joined batch from `place` on, without end.

    `place` is read whenever iteration starts. A worker gives every n-th batch of its rank. It reads the samples of its
    batches window by window, each window in stored order, and decodes nothing that it does not deliver.

    A broken sample keeps its place in the order: another sample of the pass, drawn by (seed, pass, place), is given in
    its stead. Ranks need not know what the others found broken.

    Args:
        index: index of the shards.
        decoder: decodes samples.
        shuffle: samples in a window, which are shuffled; 0 shuffles the shards alone.
        batch_size: samples of this rank in a batch.
        rank: index of this rank.
        world: number of ranks.
        place: position of all ranks.
    """

    def __init__(
        self,
        index: Index,
        decoder: Callable[[Mapping[str, Any], int], dict[str, Any]],
        shuffle: int,
        batch_size: int,
        rank: int,
        world: int,
        place: Place,
        seed: int,
    ) -> None:
        self.index, self.decoder, self.batch_size, self.place = index, decoder, batch_size, place
        self.rank, self.world, self.seed = rank, world, seed
        self.order = Order(index.first, seed, shuffle)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if not self.index.samples:
            stream.check_usable(self.index.shards, self.decoder, "data.train", "an entire pass")
        gone: set[str] = set()
        for (number, _), part in itertools.groupby(self._mine(), key=lambda mine: mine[:2]):
            places = [(place, end) for _, _, place, end in part]
            samples = {place: self.order(number, place) for place, _ in places}
            held = dict(self.index.read(samples.values(), gone))
            for place, end in places:
                sample, skipped = self._usable(number, place, held.pop(samples[place]), gone)
                yield {**sample, "position": (end, number, place + 1), "skipped": skipped}

    def _mine(self) -> Iterator[tuple[int, int, int, int]]:
        """Yield (pass, window, place in the pass, end of the joined batch) of each sample to deliver."""
        info = get_worker_info()
        slot, workers = (info.id, info.num_workers) if info else (0, 1)
        joined = self.batch_size * self.world
        for start in itertools.count(self.place["number"] + slot * joined, workers * joined):
            mine = start + self.rank * self.batch_size
            for at in range(mine, mine + self.batch_size):
                number, place = divmod(at, self.index.samples)
                yield number, place // self.order.width, place, start + joined

    def _usable(self, number: int, place: int, raw: Any, gone: set[str]) -> tuple[dict[str, Any], int]:
        """Return the decoded sample, or another one if it is broken, and how many were broken."""
        rng = random.Random(f"{self.seed} {number} {place} instead")
        for skipped in itertools.count():
            try:
                if isinstance(raw, Exception):
                    raise raw
                return self.decoder(raw, number), skipped
            except Exception as error:  # broken bytes raise various exceptions
                where = (raw["__key__"], raw["__url__"]) if isinstance(raw, Mapping) else (place, f"pass {number}")
                stream.log.debug("skipped %s in %s: %s", *where, error)
            most = min(stream.CHECK_AFTER, self.index.samples)
            if (skipped + 1) % most == 0:
                extent = "an entire pass" if most == self.index.samples else f"{most} in a row"
                stream.check_usable(self.index.shards, self.decoder, "data.train", extent)
            ((_, raw),) = self.index.read([self._another(number, place, rng)], gone)
        raise AssertionError

    def _another(self, number: int, place: int, rng: random.Random) -> int:
        """Return a random sample of the pass; not one of the same joined batch, if the pass is long enough."""
        joined, samples = self.batch_size * self.world, self.index.samples
        step = rng.randrange(joined, samples - joined + 1) if samples >= 2 * joined else rng.randrange(samples)
        return self.order(number, (place + step) % samples)
