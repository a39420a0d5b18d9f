"""WebDataset shards in, batches of images, texts and token ids out, for training and selection.

Benchmarks read decoding.py. Images are bytes until they lie on the device, a quarter to copy; there they become [0, 1].
"""

import copy
import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader

from clipfix.data.decoding import in_unit_range
from clipfix.data.needs import Needs
from clipfix.data.shards import expand
from clipfix.data.stored import check_latents
from clipfix.data.stream import Decoder, Progress, ShardStream, beginning, collate, quiet_worker
from clipfix.data.texts import Text, TextSettings
from clipfix.system.ranks import rank_of

log = logging.getLogger(__name__)


class ShardData(L.LightningDataModule):
    """Shards for training (endless, so the trainer's `max_steps` ends it) and for selection (one pass), split by rank.

    A checkpoint holds where every worker of every rank stood after the last batch that was trained on, prefetched
    ones not counted, so a resumed run goes on with exactly the next batch.
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
                f"The method reads data.texts.{absent[0]}, which this data does not give. Say where it lies in your "
                f"shards, as in '++data.texts.{absent[0]}={{key: {absent[0]}, pick: one, k: 1}}' (data/README.md), or "
                "choose another method."
            )
        if needs.features and features is None:
            raise ValueError(
                "method.mining.reference is null, so its features are read from the shards: write them by run=annotate "
                "annotator=features (data/README.md) and set data.features=features.npz, or name a reference."
            )
        if latents and needs.latents is None:
            raise ValueError("The method reads no stored latents: set data.latents=null.")
        if augment is not None and (stored := features or latents):
            raise ValueError(
                f"data.augment changes the pictures of which {stored} was stored: set data.augment=null, or "
                "data.features=null and data.latents=null."
            )
        if prepare is not None and not callable(prepare):
            raise ValueError("data.prepare is to be called when training starts: set data.prepare._partial_=true.")
        self.train, self.selection, self.allow_pipe, self.prepare = train, selection, allow_pipe, prepare
        self.texts = {name: Text(**text) for name, text in texts.items() if text is not None}
        if ragged := [name for name, text in self.texts.items() if text.k is None]:
            raise ValueError(
                f"data.texts.{ragged[0]}.k is null: a batch needs as many texts from each sample, so give k."
            )
        for key, value, least in ("batch_size", batch_size, 1), ("workers", workers, 0), ("shuffle", shuffle, 0):
            if value < least:
                raise ValueError(f"data.{key} is {value}: set {least} or more.")
        self.batch_size, self.workers, self.shuffle = batch_size, workers, shuffle
        self.seed, self.needs, self.features, self.augment = seed, needs, features, augment
        self.latents, self.latents_of = latents, needs.latents() if latents and needs.latents else None
        self.progress = beginning(workers)

    def prepare_data(self) -> None:
        """Makes the shards where they are absent; Lightning calls it on one process a machine."""
        if self.prepare is not None:
            self.prepare()
            self.prepare = None  # once is enough, whoever asks

    def setup(self, stage: str | None = None) -> None:
        self.train_shards = expand(self.train, self.allow_pipe)
        self.selection_shards = expand(self.selection, self.allow_pipe) if self.selection else []
        if self.latents is not None:
            check_latents(self.train_shards, self.latents, self.latents_of)

    def train_dataloader(self) -> DataLoader:
        return self._loader(self.train_shards, self.progress)

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        return self._loader(self.selection_shards, None) if self.selection_shards else []

    def _loader(self, shards: list[str], progress: Progress | None) -> DataLoader:
        rank, world = rank_of()
        stored = {} if progress is None else {"features": self.features, "latents": self.latents}
        augment = None if progress is None else self.augment
        decoder = Decoder(self.texts, self.needs.image_size, self.seed, augment, **stored, latents_of=self.latents_of)
        stream = ShardStream(shards, decoder, self.shuffle, rank, world, progress)
        return DataLoader(
            stream,
            batch_size=self.batch_size,
            collate_fn=partial(collate, encode=self.needs.encode),
            num_workers=self.workers,
            worker_init_fn=quiet_worker,
            # One endless iteration needs no persistence; without it, a second one starts from the newest progress.
            persistent_workers=self.workers > 0 and progress is None,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # the loader draws a seed it never uses: not from the model's random stream
        )

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """Images become floats. Lightning calls this right before a batch is used, long after it was prefetched."""
        images: Tensor = in_unit_range(batch["image"])
        if self.trainer is not None:
            if self.trainer.training:
                self.advance(batch)
            images = self.trainer.precision_plugin.convert_input(images)  # has passed over bytes before
        return {**batch, "image": images}

    def advance(self, batch: Mapping[str, Any]) -> None:
        """Records that this batch was trained on."""
        worker, number, index = batch["position"]
        self.progress["positions"][worker] = [number, index]
        self.progress["turn"] = (worker + 1) % len(self.progress["positions"])

    def state_dict(self) -> dict[str, Any]:
        """Every rank's progress; collective, as ranks differ where samples are broken. Lightning calls it on all."""
        ranks: list[Any] = [copy.deepcopy(self.progress)] * rank_of()[1]
        if len(ranks) > 1:
            dist.all_gather_object(ranks, self.progress)
        return {"ranks": ranks}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        ranks: list[Progress] = state_dict["ranks"]
        rank, world = rank_of()
        if (len(ranks), len(ranks[0]["positions"])) == (world, max(self.workers, 1)):
            self.progress.update(copy.deepcopy(ranks[rank]))
            return
        number = 1 + max(position[0] for progress in ranks for position in progress["positions"])
        log.warning("the number of ranks or data.workers changed: data goes on with the start of pass %d", number)
        self.progress.update(beginning(self.workers, number))
