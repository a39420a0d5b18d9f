"""The world on disk: ordinary WebDataset shards, drawn on first use, the same bytes for the same seed.

Why a hash decides the split: a ground truth belongs to one split for good, so no picture can be in two of them.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from hashlib import blake2b
from pathlib import Path
from random import Random
from typing import Any, Literal

from rich.progress import track

from clipfix.data.scenes.drawing import draw
from clipfix.data.scenes.words import captions, pairs, plain_summary, things_in
from clipfix.data.scenes.world import PATTERNS, WORLD, Scene, drawn_anew, factors, look_alike, sample, sample_jitter
from clipfix.system.files import add_sample

Split = Literal["train", "selection", "test"]
Kind = Literal["scenes", "pairs", "summaries"]  # as they come; look-alike pairs; groups that share one summary

SHARES: tuple[Split, ...] = ("train",) * 6 + ("selection",) * 2 + ("test",) * 2
OPENINGS = ("", "a photo of ", "a picture of ", "a drawing of ")  # how people say what they see
SERIES = 4  # a train scene and three looks at it, each with another factor changed
SHARERS = 4  # scenes with one summary
SHARD = 512  # train scenes in a shard; the other splits are one shard each


@dataclass(frozen=True)
class Job:
    """One shard, drawn on its own: what it holds depends on nothing but this."""

    kind: Kind
    split: Split
    index: int
    size: int
    seed: int
    junk: float
    wrong: float
    popular: int = 0  # train scenes that half of the shard shows

    @property
    def name(self) -> str:
        return f"{'' if self.kind == 'scenes' else self.kind + '-'}{self.split}-{self.index:05d}"


@dataclass(frozen=True)
class World:
    """The settings of a drawn world; calling it draws the shards and returns their folder.

    Sizes are numbers of scenes, of pairs for each of MMVP's nine patterns, and of groups that share a summary.

    Args:
        root: Folder of the shards.
        seed: Another seed draws other pictures.
        train, selection, test: Scenes of each split; `train` must be a multiple of 4.
        pairs_train, pairs_selection, pairs_test: Pairs for each pattern.
        summaries_test: Groups of four scenes with the same first sentence.
        junk, wrong: Share of short captions that say nothing about the picture, or are wrong in one thing.
        train_junk, train_wrong: The same for the training scenes.
        popular: If above 0, half of the training scenes come from a pool of this many, each time as another picture
            with other captions. The web repeats popular subjects, and they are false negatives in a batch.
        processes: Processes that draw; the shards do not depend on it.

    Raises:
        ValueError: `train` is no multiple of 4.
    """

    root: str | Path
    seed: int
    train: int
    selection: int
    test: int
    pairs_train: int
    pairs_selection: int
    pairs_test: int
    summaries_test: int
    junk: float
    wrong: float
    train_junk: float
    train_wrong: float
    popular: int
    processes: int = 2

    def __post_init__(self) -> None:
        if self.train % SERIES:
            raise ValueError(f"data.prepare.train={self.train} must be a multiple of {SERIES}: scenes come in series.")

    def __call__(self) -> Path:
        """Draw the shards unless they are there, and return their folder.

        Several processes may do this at once: each draws into a folder of its own, and the first to finish is kept.

        Raises:
            ValueError: The folder holds a world with other settings, or other files.
        """
        root = Path(self.root)
        if root.is_dir() and any(root.iterdir()):
            return self.verified()
        root.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{root.name}-", dir=root.parent))
        jobs = self.jobs()
        try:
            draft.chmod(0o755)
            # Spawned, not forked: the caller may run threads. Nothing imported here loads torch, so starting is quick.
            with multiprocessing.get_context("spawn").Pool(self.processes) as pool:
                drawn = pool.imap_unordered(partial(write, draft), jobs)
                for _ in track(drawn, description=f"drawing {root}", total=len(jobs)):
                    pass
            (draft / "info.json").write_text(json.dumps(self.info(), indent=1) + "\n")
            try:
                draft.rename(root)
            except OSError:  # another process was first
                return self.verified()
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        return root

    def info(self) -> dict[str, float]:
        """Return what info.json in the folder says: the version of the drawings, and all that changes the shards."""
        settings = asdict(self)
        del settings["root"], settings["processes"]
        return {"world": WORLD} | settings

    def verified(self) -> Path:
        """Return the folder, whose info.json must be this world's."""
        root, file = Path(self.root), Path(self.root, "info.json")
        found = json.loads(file.read_text()) if file.is_file() else None
        if found != self.info():
            raise ValueError(
                f"data.prepare.root={root} holds {found}, but the settings are {self.info()}: delete the folder, or "
                "set another data.prepare.root."
            )
        return root

    def jobs(self) -> list[Job]:
        """Return all shards of this world."""
        rounds = SHARD // (2 * len(PATTERNS))  # a round is one pair of each pattern
        noise, train_noise = (self.seed, self.junk, self.wrong), (self.seed, self.train_junk, self.train_wrong)
        return [
            *(Job("scenes", "train", i, n, *train_noise, self.popular) for i, n in parts(self.train, SHARD)),
            Job("scenes", "selection", 0, self.selection, *noise),
            Job("scenes", "test", 0, self.test, *noise),
            *(Job("pairs", "train", i, n, *noise) for i, n in parts(self.pairs_train, rounds)),
            Job("pairs", "selection", 0, self.pairs_selection, *noise),
            Job("pairs", "test", 0, self.pairs_test, *noise),
            Job("summaries", "test", 0, self.summaries_test, *noise),
        ]


def parts(total: int, size: int) -> list[tuple[int, int]]:
    """Return the number and size of each shard when `total` is cut into shards of `size`."""
    return [(i, min(size, total - start)) for i, start in enumerate(range(0, total, size))]


def write(folder: Path, job: Job) -> None:
    """One shard."""
    with tarfile.open(folder / f"{job.name}.tar", "w") as tar:
        for index, (scene, extra) in enumerate(contents(job)):
            key = f"{job.name}-{index:04d}"
            texts = captions(scene, Random(f"{job.seed}/{key}"), extra.get("summary"), job.junk, job.wrong)
            record = {
                "caption": texts["short"], "long": texts["long"], "captions": texts["captions"],
                "scene": scene.to_dict(), "factors": factors(scene),
                "same_scene": _truth(scene).hex(), "same_things": things_in(scene), **extra,
            }  # fmt: skip
            picture = io.BytesIO()
            draw(scene).save(picture, "png")
            parts = {"png": picture.getvalue(), "txt": texts["short"].encode(), "json": json.dumps(record).encode()}
            add_sample(tar, key, parts)


def contents(job: Job) -> Iterator[tuple[Scene, dict[str, Any]]]:
    """What a shard holds, in order."""
    rng = Random(f"{job.seed}/{job.name}")
    if job.kind == "pairs":
        for number, pattern in enumerate(pattern for _ in range(job.size) for pattern in PATTERNS):
            first, first_statement, second, second_statement = _own_pair(rng, pattern, job.split)
            for scene, statement in ((first, first_statement), (second, second_statement)):
                phrasings = [opening + statement for opening in OPENINGS]
                yield scene, {"pattern": pattern, "statement": statement, "phrasings": phrasings, "pair": number}
    elif job.kind == "summaries":
        for _ in range(job.size):
            for scene in _sharers(rng, job.split):
                yield scene, {"summary": plain_summary(scene)}
    elif job.popular:
        pool = Random(f"{job.seed}/popular")
        scenes = [_of_split(pool, job.split) for _ in range(job.popular)]
        for _ in range(job.size):
            scene = _again(rng.choice(scenes), rng) if rng.random() < 0.5 else _of_split(rng, job.split)
            yield scene, {}
    elif job.split == "train":
        for number in range(job.size // SERIES):
            for scene in series(rng):
                yield scene, {"series": job.index * SHARD // SERIES + number}
    else:
        seen: set[bytes] = set()
        while len(seen) < job.size:
            scene = sample(rng)
            if split_of(scene) == job.split and _truth(scene) not in seen:
                seen.add(_truth(scene))
                yield scene, {}


def _of_split(rng: Random, split: Split) -> Scene:
    while True:
        scene = sample(rng)
        if split_of(scene) == split:
            return scene


def _again(scene: Scene, rng: Random) -> Scene:
    """The same ground truth in another picture."""
    return replace(scene, jitter=sample_jitter(len(scene.things), rng))


def _own_pair(rng: Random, pattern: str, split: Split) -> tuple[Scene, str, Scene, str]:
    while True:
        pair = pairs(rng, pattern)
        if split_of(pair[0]) == split_of(pair[2]) == split:
            return pair


def _sharers(rng: Random, split: Split) -> list[Scene]:
    """Scenes of the same things in the same colours, all else anew: what follows the summary tells them apart."""
    while True:
        base = sample(rng)
        candidates = [base, *(drawn_anew(base, rng) for _ in range(16 * SHARERS))]
        found = {_truth(scene): scene for scene in candidates if split_of(scene) == split}
        if len(found) >= SHARERS:
            return list(found.values())[:SHARERS]


def series(rng: Random) -> list[Scene]:
    """A train scene and three looks at it, each changed after another pattern: hard negatives, when read in order."""
    while True:
        base = _of_split(rng, "train")
        looks = [base]
        for pattern in rng.sample(sorted(PATTERNS), len(PATTERNS)):
            look = look_alike(base, pattern, rng)
            if look and split_of(look) == "train":
                looks.append(look)
            if len(looks) == SERIES:
                return looks


def split_of(scene: Scene) -> Split:
    """The one split that may show this ground truth."""
    return SHARES[int.from_bytes(_truth(scene)) % len(SHARES)]


def _truth(scene: Scene) -> bytes:
    """A name for what is drawn, whatever the jitter."""
    plain = replace(scene, jitter=())
    return blake2b(json.dumps(plain.to_dict()).encode(), digest_size=8).digest()
