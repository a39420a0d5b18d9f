"""WebDataset shards in, batches of [0, 1] images and strings out: `ShardData` trains, `samples` reads for benchmarks.

The stream is a chain of passes over all shards. Shuffling happens on undecoded bytes and every random choice is a
function of (seed, pass, sample), so a position (pass, samples taken) says exactly where a worker stands.
"""

import copy
import io
import itertools
import json
import logging
import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, TypedDict
from urllib.parse import urlsplit

import lightning as L
import numpy as np
import torch
import torch.distributed as dist
import webdataset as wds
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as tvf

from clipfix.shards import expand, read_shard

log = logging.getLogger(__name__)

IMAGES = ("jpg", "jpeg", "png", "webp")
# What a file may be whatever its suffix says. Pillow knows more, and for one of them (EPS) it would start Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
LONGEST_TEXT = 20_000  # characters: no tower reads as many, and a tokenizer takes seconds for a few million
LONGEST_SIDE = 20  # times the shorter one: beyond it a whole resized picture would be mostly cut away
PICKS = ("one", "first_sentence", "other_sentences", "all", "random")


def encoded_image(raw: Mapping[str, Any]) -> bytes:
    """The image file of a sample."""
    data = next((raw[suffix] for suffix in IMAGES if suffix in raw), None)
    if data is None:
        raise ValueError(f"no image ({', '.join(IMAGES)})")
    return data


def fingerprint(raw: Mapping[str, Any]) -> str:
    """Of the image file: it tells whether that was changed after something was stored of it."""
    return blake2b(encoded_image(raw), digest_size=16).hexdigest()


def decode(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Image (RGB), txt and json of one sample; raises on anything broken.

    Of an animation the first frame. EXIF's orientation is left alone, as CLIP's and open_clip's own loaders leave it:
    a turned picture would be another one than those that the published weights were trained and scored on.
    """
    data = encoded_image(raw)
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
    if image.mode.startswith("I"):  # 16 bits, of which Pillow would clip all that is above 255 to white
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    image = image.convert("RGB")
    record = json.loads(raw.get("json", b"{}"))
    if not isinstance(record, dict):
        raise ValueError("its json is not an object")
    return {"key": raw["__key__"], "image": image, "txt": raw.get("txt", b"").decode().strip(), "json": record}


def samples(urls: str | Iterable[str], allow_pipe: bool = False) -> Iterator[dict[str, Any]]:
    """One decoded pass in stored order: {key, image (PIL), txt, json}; for benchmarks and looking around."""
    return readable(undecoded(urls, allow_pipe))


def undecoded(urls: str | Iterable[str], allow_pipe: bool = False) -> Iterator[dict[str, Any]]:
    """One pass in stored order, as the samples lie in their shards: bytes by suffix."""
    for url in expand(urls, allow_pipe):
        yield from read_shard(url)


def readable(raws: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """The samples that can be decoded; of each other one, a line in the log."""
    for raw in raws:
        try:
            sample = decode(raw)
        except Exception as error:
            log.warning("%s in %s is broken (%s): skipped", raw["__key__"], raw["__url__"], error)
            continue
        yield sample


def square(image: Image.Image, size: int) -> Float[Tensor, "3 size size"]:
    """Shorter side to `size` (bicubic), centre crop, [0, 1]: what open_clip does before its mean and std."""
    return tvf.to_tensor(cropped(image, size))


def cropped(image: Image.Image, size: int) -> Image.Image:
    """The picture that `square` gives, in bytes."""
    if max(image.size) > LONGEST_SIDE * min(image.size):  # the same, without what 20,000 x 1 would be as a whole
        side, left, top = min(image.size), (image.width - min(image.size)) / 2, (image.height - min(image.size)) / 2
        box = (left, top, left + side, top + side)
        return image.resize((size, size), Image.Resampling.BICUBIC, box)
    return tvf.center_crop(tvf.resize(image, size, InterpolationMode.BICUBIC), size)


@dataclass(frozen=True)
class Text:
    """Which text of a sample goes into the batch: `key` says where it lies, `pick` which of several, `k` how many.

    A batch is rectangular, so every sample gives exactly k texts: `all` takes them in order, `random` in an order
    drawn anew each pass, and both begin again at the first when a sample has fewer than k. `k` of None takes as many as
    there are: for benchmarks alone.
    """

    key: str
    pick: str
    k: int | None = 1

    def __post_init__(self) -> None:
        if self.pick not in PICKS:
            raise ValueError(f"data.texts: pick {self.pick!r} is none of {', '.join(PICKS)}")
        if (self.k is not None and self.k < 1) or (self.k != 1 and self.pick not in ("all", "random")):
            raise ValueError(f"data.texts: k={self.k} with pick={self.pick}: k > 1 needs pick=all or pick=random")

    @property
    def whole(self) -> bool:
        """Whether it gives texts as they lie there, so that what is stored of them can be looked up."""
        return self.pick not in ("first_sentence", "other_sentences")

    def draw(self, sample: Mapping[str, Any], rng: random.Random) -> list[str]:
        texts = strings(sample, self.key)
        if self.pick == "first_sentence":  # Source: Long-CLIP (arXiv 2403.15378), short caption of its training set
            texts = [texts[0].split(". ", 1)[0]]
        elif self.pick == "other_sentences":
            texts = [other_sentences(texts[0], rng)]
        elif self.pick == "random":
            texts = rng.sample(texts, len(texts))
        return texts if self.k is None else list(itertools.islice(itertools.cycle(texts), self.k))


def strings(sample: Mapping[str, Any], key: str) -> list[str]:
    """The texts that lie under a key of a decoded sample, one or more."""
    found = sample["txt"] if key == "txt" else sample["json"].get(key)
    several = found if isinstance(found, list) else [found] if isinstance(found, str) else []
    texts = [text.strip()[:LONGEST_TEXT] for text in several if text.strip()]
    if not texts:
        raise ValueError(f"no text under {key!r} (its json has: {', '.join(sample['json']) or 'nothing'})")
    "".join(texts).encode()  # json can hold half a surrogate pair, on which tokenizers fail
    return texts


def other_sentences(text: str, rng: random.Random) -> str:
    """Some of the sentences after the first, in any order; a text of one sentence as it is.

    Source: DeBias-CLIP (arXiv 2602.22419), its short caption: the first sentence, a summary, is left out, and the
    number of the others is uniform.
    """
    others = [sentence for sentence in text.split(". ")[1:] if sentence.strip()]
    if not others:
        return text
    return ". ".join(rng.sample(others, rng.randint(1, len(others)))).strip()


def look_up(
    raw: Mapping[str, Any], member: str, texts: Mapping[str, Text], drawn: Mapping[str, list[str]]
) -> dict[str, Tensor]:
    """What `run=annotate annotator=features` stored: `image` [1, d], and [k, d] of drawn texts whose key it encoded."""
    if member not in raw:
        raise ValueError(f"no {member}: make it by run=annotate annotator=features, or set data.features=null")
    with np.load(io.BytesIO(raw[member]), allow_pickle=False) as stored:
        image, rows = (torch.from_numpy(stored[name]).float() for name in ("image", "text"))
        row = {text: i for i, text in enumerate(stored["strings"].tolist())}
        keys = stored["keys"].tolist()
    found = {"image": image[None]}
    for name, text in texts.items():
        if not text.whole or text.key not in keys:
            continue
        if absent := [string for string in drawn[name] if string not in row]:
            raise ValueError(f"{member} has nothing of the {name} {absent[0]!r}: annotate these shards again")
        found[name] = rows[[row[string] for string in drawn[name]]]
    return found


def look_up_latent(raw: Mapping[str, Any], member: str, of: str | None) -> Float[Tensor, "c y x"]:
    """What `run=annotate annotator=latents` stored of this very picture; `of` is what `Diffusion.latents_of` says."""
    if member not in raw:
        raise ValueError(no_latents(member))
    with np.load(io.BytesIO(raw[member]), allow_pickle=False) as stored:
        latent, found, picture = (stored[name] for name in ("latent", "of", "picture"))
    if found != of:
        raise ValueError(f"its {member} is of {found}, not of {of}")
    if picture != fingerprint(raw):
        raise ValueError(f"its picture is not the one that {member} was made of: annotate these shards again")
    return torch.from_numpy(latent).float()


def check_latents(shards: list[str], member: str, of: str | None) -> None:
    """Refuses shards without latents, or with those of another autoencoder or size, before anything is trained.

    The first sample of each local shard is asked; of others, which may take long to open, that of the first shard.
    """
    for shard in [shard for shard in shards if not urlsplit(shard).scheme] or shards[:1]:
        for raw in itertools.islice(read_shard(shard), 1):
            if member not in raw:
                raise ValueError(f"{shard} has {no_latents(member)}")
            try:
                with np.load(io.BytesIO(raw[member]), allow_pickle=False) as stored:
                    found = str(stored["of"])
            except Exception:  # damaged: training counts it with other broken samples
                continue
            if found != of:
                raise ValueError(
                    f"{shard} has latents of {found}, and this run reads those of {of}: write them by run=annotate "
                    "annotator=latents with diffusion and backbone as here, or set data.latents=null"
                )


def no_latents(member: str) -> str:
    return f"no {member}: make it by run=annotate annotator=latents, or set data.latents=null"


# ------------------------------------------------------------------------------------------------------------- streams


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


class ShardStream(IterableDataset):
    """What one rank reads: endless shuffled passes from `progress` on, or one pass in stored order when it is None.

    `progress` is read anew whenever iteration starts. The loader asks worker 0 first, so the worker whose turn it is
    takes that place: a resumed run sees the batches that the interrupted one would have seen.
    """

    def __init__(
        self,
        shards: list[str],
        texts: Mapping[str, Text],
        image_size: int,
        seed: int,
        shuffle: int,
        rank: int,
        world: int,
        progress: Progress | None,
        features: str | None = None,
        latents: str | None = None,
        latents_of: str | None = None,
    ) -> None:
        self.shards, self.texts, self.image_size = shards, texts, image_size
        self.seed, self.shuffle, self.rank, self.world, self.progress = seed, shuffle, rank, world, progress
        self.features, self.latents, self.latents_of = features, latents, latents_of

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        slot, workers = (info.id, info.num_workers) if info else (0, 1)
        start = self.progress or beginning(workers)
        worker = (slot + start["turn"]) % workers
        first, taken = start["positions"][worker]
        skipped, dry = 0, 0
        for number in itertools.count(first):
            usable, reason = 0, ""
            raws = enumerate(self._raws(number, self.rank * workers + worker, self.world * workers), start=1)
            for index, raw in itertools.islice(raws, taken, None):
                try:
                    sample = self._decode(raw, number)
                except Exception as error:  # broken bytes raise anything; the last reason is told if all are broken
                    skipped, reason = skipped + 1, f"{raw['__key__']} in {raw['__url__']}: {error}"
                    log.debug("skipped %s", reason)
                    continue
                yield {**sample, "position": (worker, number, index), "skipped": skipped}
                usable, skipped = usable + 1, 0
            if self.progress is None:
                return
            # An unreadable shard may be all that this pass gave this worker; the next pass deals the shards anew.
            dry = 0 if usable or taken else dry + 1
            if dry and (reason or dry > len(self.shards)):
                raise ValueError(
                    f"worker {worker} of rank {self.rank} found no usable sample in a whole pass: "
                    + (reason or "its shards cannot be read, which the log then says, or there are too few for every ")
                    + ("" if reason else "worker to get one: lower data.workers or the number of devices")
                )
            taken = 0

    def _raws(self, number: int, consumer: int, consumers: int) -> Iterator[dict[str, Any]]:
        if self.progress is None:
            return share(self.shards, consumer, consumers)
        order = random.Random(f"{self.seed} {number}").sample(self.shards, len(self.shards))
        raws = share(order, consumer, consumers)
        if not self.shuffle:
            return raws
        rng = random.Random(f"{self.seed} {number} {consumer}")
        return wds.shuffle(self.shuffle, initial=self.shuffle, rng=rng)(raws)

    def _decode(self, raw: Mapping[str, Any], number: int) -> dict[str, Any]:
        sample = decode(raw)
        texts = {
            name: text.draw(sample, random.Random(f"{self.seed} {number} {sample['key']} {name}"))
            for name, text in self.texts.items()
        }
        sample = {
            "key": sample["key"],
            "image": tvf.pil_to_tensor(cropped(sample["image"], self.image_size)),
            "texts": texts,
        }
        if self.features is not None:
            sample["features"] = look_up(raw, self.features, self.texts, texts)
        if self.latents is not None:
            sample["latents"] = look_up_latent(raw, self.latents, self.latents_of)
        return sample


def collate(batch: list[dict[str, Any]]) -> dict[str, Any]:
    """Images stacked, texts sample-major; `position` is where the worker stood after the batch's last sample."""
    features: list[dict[str, Tensor]] = [sample["features"] for sample in batch if "features" in sample]
    joined = {name: torch.cat([found[name] for found in features]) for name in features[0]} if features else {}
    latents: list[Tensor] = [sample["latents"] for sample in batch if "latents" in sample]
    return {
        "key": [sample["key"] for sample in batch],
        # Bytes until here: a quarter to copy, and one large float tensor where there were as many as samples.
        "image": torch.stack([sample["image"] for sample in batch]).float().div_(255),
        "position": batch[-1]["position"],
        "skipped": sum(sample["skipped"] for sample in batch),
        **{name: [text for sample in batch for text in sample["texts"][name]] for name in batch[0]["texts"]},
        **({"features": joined} if features else {}),
        **({"latents": torch.stack(latents)} if latents else {}),
    }


class ShardData(L.LightningDataModule):
    """Shards for training (endless, so the trainer's `max_steps` ends it) and for selection (one pass), split by rank.

    A checkpoint holds where every worker of every rank stood after the last batch that was trained on, prefetched
    ones not counted, so a resumed run goes on with exactly the next batch.
    """

    def __init__(
        self,
        train: str | list[str],
        selection: str | list[str] | None,
        texts: Mapping[str, Mapping[str, Any] | None],
        batch_size: int,
        workers: int,
        shuffle: int,
        seed: int,
        image_size: int,
        allow_pipe: bool = False,
        prepare: Callable[[], object] | None = None,
        features: str | None = None,
        latents: str | None = None,
        latents_of: str | None = None,
    ) -> None:
        super().__init__()
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
        self.seed, self.image_size, self.features = seed, image_size, features
        self.latents, self.latents_of = latents, latents_of
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
        return self._loader(self.train_shards, self.progress, self.features, self.latents)

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        return self._loader(self.selection_shards, None) if self.selection_shards else []

    def _loader(
        self, shards: list[str], progress: Progress | None, features: str | None = None, latents: str | None = None
    ) -> DataLoader:
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        stream = ShardStream(
            shards,
            self.texts,
            self.image_size,
            self.seed,
            self.shuffle,
            rank,
            world,
            progress,
            features,
            latents,
            self.latents_of,
        )
        return DataLoader(
            stream,
            batch_size=self.batch_size,
            collate_fn=collate,
            num_workers=self.workers,
            # One endless iteration needs no persistence; without it, a second one starts from the newest progress.
            persistent_workers=self.workers > 0 and progress is None,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # the loader draws a seed it never uses: not from the model's random stream
        )

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """Lightning calls this right before a batch is trained on, long after it was prefetched."""
        if self.trainer is not None and self.trainer.training:
            self.advance(batch)
        return batch

    def advance(self, batch: Mapping[str, Any]) -> None:
        """Records that this batch was trained on."""
        worker, number, index = batch["position"]
        self.progress["positions"][worker] = [number, index]
        self.progress["turn"] = (worker + 1) % len(self.progress["positions"])

    def state_dict(self) -> dict[str, Any]:
        """Every rank's progress; collective, as ranks differ where samples are broken. Lightning calls it on all."""
        ranks: list[Any] = [copy.deepcopy(self.progress)]
        if dist.is_initialized():
            ranks = [None] * dist.get_world_size()
            dist.all_gather_object(ranks, self.progress)
        return {"ranks": ranks}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        ranks: list[Progress] = state_dict["ranks"]
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        if (len(ranks), len(ranks[0]["positions"])) == (world, max(self.workers, 1)):
            self.progress.update(copy.deepcopy(ranks[rank]))
            return
        number = 1 + max(position[0] for progress in ranks for position in progress["positions"])
        log.warning("the number of ranks or data.workers changed: data goes on with the start of pass %d", number)
        self.progress.update(beginning(self.workers, number))
