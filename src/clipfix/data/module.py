"""The data module: batches of images, texts and token ids from WebDataset shards, for training and selection.

Images are copied to the device as bytes, a quarter of the size of floats, and converted to [0, 1] there. Benchmarks do
not use this module; they read samples by decoding.py.
"""

import copy
import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, cast

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from clipfix.data.decoding import in_unit_range
from clipfix.data.index import Index, index_of
from clipfix.data.needs import Needs
from clipfix.data.order import OrderedStream, Place
from clipfix.data.shards import expand
from clipfix.data.stored import check_latents
from clipfix.data.stream import Decoder, Progress, ShardStream, collate, init_worker, start_of_pass
from clipfix.data.texts import Text, TextSettings
from clipfix.system.ranks import rank_of

log = logging.getLogger(__name__)


class ShardData(L.LightningDataModule):
    """Loads shards for training, as an endless stream, and for selection, in one pass, split over the ranks.

    A checkpoint holds the position after the last batch that was trained on. Prefetched batches do not count, so a
    resumed run continues with exactly the next batch. For local shards, which are read by an index, the position is one
    number, and the joined batches are the same for any number of ranks and workers (`order.py`). For streamed shards
    (http, s3, pipe, compressed) it is the position of each worker of each rank (`stream.py`).

    Args:
        train: urls, paths, globs or folders of shards, as `shards.expand` reads them.
        selection: shards of the selection split, in the same form; None for no validation.
        texts: settings of `Text` by name; None leaves a name out.
        batch_size: samples of each rank in a batch.
        workers: loader processes of each rank; 0 loads in the training process.
        shuffle: samples that are shuffled together, and the most that a worker keeps in memory for it; 0 keeps the
            order within shards.
        seed: seed of the run.
        needs: what the method reads from a batch.
        allow_pipe: whether `pipe:` urls, which run shell commands, are allowed.
        prepare: called once, before training, to write missing shards.
        features: name of the shard member that holds stored features; None for none.
        latents: name of the shard member that holds stored latents; None for none.
        augment: transform of the decoded picture in training.

    Raises:
        ValueError: if the data lacks what the method needs, or a setting is invalid.
    """

    def __init__(
        self,
        train: str | list[str],
        selection: str | list[str] | None,
        texts: Mapping[str, TextSettings | None],
        batch_size: int,
        workers: int,
        shuffle: int,
        seed: int,
        needs: Needs,
        allow_pipe: bool = False,
        prepare: Callable[[], object] | None = None,
        features: str | None = None,
        latents: str | None = None,
        augment: Callable[[Any], Any] | None = None,
    ) -> None:
        super().__init__()
        if absent := [name for name in needs.texts if not texts.get(name)]:
            raise ValueError(
                f"The method reads data.texts.{absent[0]}, which this data does not define: set its key in your "
                f"shards, as in '++data.texts.{absent[0]}={{key: {absent[0]}, pick: one, k: 1}}' (data/README.md), "
                "or choose another method."
            )
        if needs.features and features is None:
            raise ValueError(
                "method.mining.reference is null, so data.features must name stored features: write them with "
                "run=annotate annotator=features (data/README.md) and set data.features=features.npz, or set a "
                "reference."
            )
        if latents and needs.latents is None:
            raise ValueError(f"data.latents is {latents}, but the method reads no latents: set data.latents=null.")
        if augment is not None and (stored := features or latents):
            raise ValueError(
                f"data.augment changes the pictures from which {stored} was computed: set data.augment=null, or "
                "data.features=null and data.latents=null."
            )
        if prepare is not None and not callable(prepare):
            raise ValueError("data.prepare is not callable: set data.prepare._partial_=true.")
        self.train, self.selection, self.allow_pipe, self.prepare = train, selection, allow_pipe, prepare
        self.texts = {name: Text(**text) for name, text in texts.items() if text is not None}
        if ragged := [name for name, text in self.texts.items() if text.k is None]:
            raise ValueError(
                f"data.texts.{ragged[0]}.k is null, but all samples of a batch have the same number of texts: set k."
            )
        for key, value, least in ("batch_size", batch_size, 1), ("workers", workers, 0), ("shuffle", shuffle, 0):
            if value < least:
                raise ValueError(f"data.{key} is {value}: set {least} or more.")
        self.batch_size, self.workers, self.shuffle = batch_size, workers, shuffle
        self.seed, self.needs, self.features, self.augment = seed, needs, features, augment
        self.latents, self.latents_of = latents, needs.latents() if latents and needs.latents else None
        self.progress: Progress | Place = start_of_pass(workers)
        self._index: Index | Literal[False] | None = None  # None: not looked for yet; False: shards are streamed

    def prepare_data(self) -> None:
        """Write missing shards. Lightning calls this in one process of each machine."""
        if self.prepare is not None:
            self.prepare()
            self.prepare = None  # a second call would check all shards again

    def setup(self, stage: str | None = None) -> None:
        self.train_shards = expand(self.train, self.allow_pipe)
        self.selection_shards = expand(self.selection, self.allow_pipe) if self.selection else []
        if self.latents is not None:
            check_latents(self.train_shards, self.latents, self.latents_of)

    def index(self) -> Index | None:
        """Return the index of the training shards; None if they are streamed. A collective operation the first time."""
        if self._index is None:
            rank, world = rank_of()
            made: list[Any] = [index_of(self.train_shards) if rank == 0 else None]
            if world > 1:  # one rank reads the headers for all
                dist.broadcast_object_list(made)
            (index,) = made
            self._index = False if index is None else index
            if index is not None:
                self.progress = Place(number=0, samples=index.samples)
        return None if self._index is False else self._index

    def train_dataloader(self) -> DataLoader:
        index = self.index()
        decoder = self._decoder(self.augment, features=self.features, latents=self.latents)
        if index is None:
            return self._loader(self._stream(self.train_shards, decoder, cast(Progress, self.progress)), False)
        rank, world = rank_of()
        place = cast(Place, self.progress)
        return self._loader(
            OrderedStream(index, decoder, self.shuffle, self.batch_size, rank, world, place, self.seed), False
        )

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        if not self.selection_shards:
            return []
        return self._loader(self._stream(self.selection_shards, self._decoder(None), None), True)

    def _decoder(self, augment: Callable[[Any], Any] | None, **stored: str | None) -> Decoder:
        return Decoder(self.texts, self.needs.image_size, self.seed, augment, **stored, latents_of=self.latents_of)

    def _stream(self, shards: list[str], decoder: Decoder, progress: Progress | None) -> ShardStream:
        return ShardStream(shards, decoder, self.shuffle, *rank_of(), progress)

    def _loader(self, stream: IterableDataset, again: bool) -> DataLoader:
        return DataLoader(
            stream,
            batch_size=self.batch_size,
            collate_fn=partial(collate, encode=self.needs.encode),
            num_workers=self.workers,
            worker_init_fn=init_worker,
            # Training iterates once, endlessly. New workers of a second iteration start from the newest progress.
            persistent_workers=self.workers > 0 and again,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # the loader draws an unused seed; keep it out of the model's random stream
        )

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """Convert images to floats and record the position. Lightning calls this right before a batch is used."""
        images: Tensor = in_unit_range(batch["image"])
        if self.trainer is not None:
            if self.trainer.training:
                self.advance(batch)
            images = self.trainer.precision_plugin.convert_input(images)  # Lightning called it on bytes, in vain
        return {**batch, "image": images}

    def advance(self, batch: Mapping[str, Any]) -> None:
        """Record that this batch is trained on."""
        if self.index() is not None:
            cast(Place, self.progress)["number"] = batch["position"][0]
            return
        progress = cast(Progress, self.progress)
        worker, number, place = batch["position"]
        progress["positions"][worker] = [number, place]
        progress["turn"] = (worker + 1) % len(progress["positions"])

    def state_dict(self) -> dict[str, Any]:
        """Return the position. A collective operation, which Lightning calls on all ranks.

        It is one for all ranks if the shards have an index. Otherwise each rank has its own, because each skips its own
        broken samples.
        """
        if self.index() is not None:
            return dict(self.progress)
        ranks: list[Any] = [copy.deepcopy(self.progress)] * rank_of()[1]
        if len(ranks) > 1:
            dist.all_gather_object(ranks, self.progress)
        return {"ranks": ranks}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a position. One that does not fit these shards continues with the next pass, and says so."""
        index = self.index()
        if "ranks" in state_dict:
            ranks: list[Progress] = state_dict["ranks"]
            rank, world = rank_of()
            if index is None and (len(ranks), len(ranks[0]["positions"])) == (world, max(self.workers, 1)):
                cast(Progress, self.progress).update(copy.deepcopy(ranks[rank]))
                return
            number = 1 + max(position[0] for progress in ranks for position in progress["positions"])
            why = (
                "The number of ranks or data.workers changed, and these shards are streamed"
                if index is None
                else "The checkpoint holds a position in streamed shards, or is of an older version"
            )
        else:
            if index is not None and state_dict["samples"] == index.samples:
                cast(Place, self.progress).update(cast(Place, dict(state_dict)))
                return
            number = 1 + state_dict["number"] // state_dict["samples"]
            here = "streamed" if index is None else str(index.samples)
            why = f"The checkpoint was written on {state_dict['samples']} samples in local shards, and now it is {here}"
        log.warning("%s: data continues from the start of pass %d.", why, number)
        if index is None:
            cast(Progress, self.progress).update(start_of_pass(self.workers, number))
        else:
            cast(Place, self.progress)["number"] = number * index.samples
