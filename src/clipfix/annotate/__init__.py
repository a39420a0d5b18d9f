"""Copies of shards with more files in each sample: `python -m clipfix run=annotate`.

The output of a frozen model for a picture is the same in every pass of every run, so it is computed once and stored
with the picture. An annotator is a class with `prepare` and `annotate`, and one yaml in conf/annotator. This module
runs it; work.py manages the output folder.

Each device and each of its workers takes whole shards, and no batch contains samples of two. The output is therefore
the same for any number of devices, and no device waits for another.
"""

import json
import logging
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from clipfix.annotate.work import COUNTED, Draft, Raw, Work, plan
from clipfix.data.decoding import decode
from clipfix.data.shards import read_shard, warn

__all__ = ["Annotator", "Raw", "Sample", "annotate", "plan", "summarize"]

log = logging.getLogger(__name__)

PERIOD = 24 * 3600  # seconds over which the bar averages, because a shard takes minutes

Sample = dict[str, Any]  # a decoded sample: key, image, txt, json


# ------------------------------------------------------------------------------------------------------------- reading


class Reader(IterableDataset):
    """Yield the batches of one shard after the other, ready for the device. An empty batch ends each shard."""

    def __init__(self, shards: list[tuple[str, str]], prepare: Callable[[list[Sample]], Any], batch_size: int) -> None:
        self.shards, self.prepare, self.batch_size = shards, prepare, batch_size

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        slot, workers = (info.id, info.num_workers) if info else (0, 1)
        for name, url in self.shards[slot::workers]:
            errors, left_out = list[str](), list[str]()
            raws = read_shard(url, on_error=partial(note, errors))
            while pairs := list(self._decoded(raws, left_out := [])):
                kept, inputs = self._ready(pairs, left_out)
                yield {"shard": name, "raws": kept, "inputs": inputs, "left_out": left_out, "end": False}
            broken = errors[0] if errors else None
            yield {"shard": name, "raws": [], "inputs": None, "left_out": left_out, "end": True, "broken": broken}

    def _decoded(self, raws: Iterator[Raw], left_out: list[str]) -> Iterator[tuple[Raw, Sample]]:
        """Yield the next samples that can be decoded, at most a batch; `left_out` gets a line for each other one."""
        count = 0
        for raw in raws:
            try:
                sample = decode(raw)
            except Exception as error:  # broken bytes may raise any error
                left_out.append(f"{raw['__key__']} in {raw['__url__']} is broken ({error}): left out")
                continue
            yield raw, sample
            if (count := count + 1) == self.batch_size:
                return

    def _ready(self, pairs: list[tuple[Raw, Sample]], left_out: list[str]) -> tuple[list[Raw], Any]:
        """Return samples and their inputs for the device; if the batch fails, leave out the samples that fail alone."""
        try:
            return [raw for raw, _ in pairs], self.prepare([sample for _, sample in pairs])
        except Exception as error:
            if len(pairs) == 1:
                key, url = pairs[0][0]["__key__"], pairs[0][0]["__url__"]
                left_out.append(f"{key} in {url} cannot be annotated ({error}): left out")
                return [], None
        kept = [pair for pair in pairs if self._ready([pair], left_out)[0]]
        return ([raw for raw, _ in kept], self.prepare([sample for _, sample in kept])) if kept else ([], None)


def note(errors: list[str], url: str, error: Exception) -> None:
    """Log that a shard is broken, as `read_shard` does by itself, and keep the message."""
    warn(url, error)
    errors.append(f"shard {url} is broken ({error}): using its readable part")


def exit_with_parent(slot: int) -> None:
    """Make a loader worker exit when its parent has ended, even if that was killed while it waited for a batch."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the inherited handler is Lightning's, which waits for other ranks
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


# ------------------------------------------------------------------------------------------------------------- running


class Annotator(L.LightningModule):
    """Base class. The constructor of an annotator sets `prepare` and loads its model; the class defines `annotate`."""

    # Returns the inputs of `annotate` for decoded samples. It runs in worker processes, so it must not hold the model.
    # A sample for which it raises an error is left out.
    prepare: Callable[[list[Sample]], Any]
    work: Work
    workers: int

    def __init__(self, output: str, batch_size: int) -> None:
        """Args: `output` is a key of every annotator; `plan` reads it from the config before the annotator is built."""
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"annotator.batch_size={batch_size} must be 1 or more.")
        self.batch_size = batch_size
        self.drafts: dict[str, Draft] = {}

    def annotate(self, raws: list[Raw], inputs: Any) -> list[dict[str, bytes]]:
        """Return the new files of each sample by suffix; a file that the sample has already is replaced."""
        raise NotImplementedError

    def predict_dataloader(self) -> DataLoader:
        names = self.work.missing[self.trainer.global_rank :: self.trainer.world_size]
        shards = [(name, self.work.shards[name]) for name in names]
        return DataLoader(
            Reader(shards, self.prepare, self.batch_size),
            batch_size=None,
            num_workers=self.workers,
            worker_init_fn=exit_with_parent,
            pin_memory=torch.cuda.is_available(),
        )

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> int:
        """Write one batch; several shards are open at a time, one for each worker."""
        if self.trainer.received_sigterm:  # Lightning checks this only in training
            raise SIGTERMException(128 + signal.SIGTERM)
        for line in batch["left_out"]:
            log.warning(line)
        name = batch["shard"]
        if name not in self.drafts:
            self.drafts[name] = Draft(self.work.folder, name, self.work.shards[name])
        draft = self.drafts[name]
        draft.counts["left_out"] += len(batch["left_out"])
        if raws := batch["raws"]:
            for raw, members in zip(raws, self.annotate(raws, batch["inputs"]), strict=True):
                draft.add(raw | members)
        if batch["end"]:
            self.drafts.pop(name).finish(batch["broken"])
        return len(raws)


class Bar(L.Callback):
    """Progress bar: finished shards of all devices, and samples of the first device."""

    def __init__(self, work: Work) -> None:
        self.work, self.samples = work, 0
        self.bar = Progress(
            TextColumn("annotating"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total} shards, {task.fields[samples]} samples a device"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            speed_estimate_period=PERIOD,
        )
        there = len(work.shards) - len(work.missing)
        self.task = self.bar.add_task("", total=len(work.shards), completed=there, samples=0, start=False)

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            self.bar.start()
            self.bar.start_task(self.task)

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self.samples += outputs
        if trainer.is_global_zero:
            self.bar.update(self.task, samples=self.samples)
            if batch["end"]:
                self.look()

    def stop(self) -> None:
        if self.bar.live.is_started:
            self.bar.stop()

    def look(self) -> int:
        """Update the bar and return the number of missing shards."""
        missing = sum(not (self.work.folder / f"{name}.json").exists() for name in self.work.missing)
        self.bar.update(self.task, completed=len(self.work.shards) - missing)
        return missing


def annotate(annotator: Annotator, work: Work, workers: int, make_trainer: Callable[..., L.Trainer]) -> None:
    """Write the missing shards; on the first device, return when all devices have finished."""
    annotator.work, annotator.workers = work, workers
    bar = Bar(work)
    try:
        trainer = make_trainer(callbacks=[bar])
        trainer.predict(annotator, return_predictions=False)
        # A barrier would time out after some minutes. A device has finished when its last shard is there.
        while trainer.is_global_zero and bar.look():
            time.sleep(0.2)
    finally:
        bar.stop()
        for draft in annotator.drafts.values():
            draft.discard()
    if trainer.is_global_zero:
        for leftover in work.folder.glob(".*.part"):  # from a run that was killed
            leftover.unlink(missing_ok=True)


@rank_zero_only
def summarize(work: Work) -> None:
    """Print the counts of samples of this run, and log which shards are incomplete."""
    reports = {name: json.loads((work.folder / f"{name}.json").read_text()) for name in work.missing}
    broken = {name: counts["broken"] for name, counts in reports.items() if counts["broken"]}
    for name, reason in broken.items():
        there = "is incomplete" if reports[name]["samples"] else "was not written"
        log.warning("%s.tar %s, and will be tried again by the next run: %s", name, there, reason)
    if work.missing and not any((work.folder / f"{name}.tar").exists() for name in work.shards):
        raise ValueError(f"no shard could be annotated: {next(iter(broken.values()))}")
    count: Counter[str] = Counter()
    for counts in reports.values():
        count.update({key: counts[key] for key in COUNTED}, written=int(counts["samples"] > 0 or not counts["broken"]))
    line = (
        f"{count['written']} shards written, {len(work.shards) - len(work.missing)} already there; "
        f"{count['samples']} samples written, {count['left_out']} broken ones left out: {work.folder}"
    )
    print(f"{line} ({len(broken)} shards are incomplete, see above)" if broken else line)
