"""Writes WebDataset shards from ShareGPT4V's json and a folder of pictures: `python -m clipfix run=prepare`.

Each shard has a small json beside it with counts of written and skipped records. It is written last, so a killed run
leaves complete shards with their counts, and the next run writes the others.
"""

import json
import logging
import tarfile
from collections import Counter
from collections.abc import Iterator
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from rich.console import Console
from rich.filesize import decimal
from rich.progress import track
from rich.table import Table

from clipfix.system.files import add_sample, atomic_write, put_json

log = logging.getLogger(__name__)

# This module must not import torch, so that shards can be written on a machine that only stores data.

IMAGES = ("jpg", "jpeg", "png", "webp")  # the suffixes that decoding.py reads
OUTCOMES = ("written", "absent", "unusable", "no caption")  # a record that is not written has the first that applies
SEED = 0  # seed of the order of the training records


class Record(NamedTuple):
    """A picture and its caption."""

    number: int  # index in the json, and the key in the shard
    image: str
    caption: str

    @property
    def source(self) -> str:
        """Name of the data set of the picture: coco, llava or sam."""
        return self.image.split("/", 1)[0]


class Shard(NamedTuple):
    """The records of one shard."""

    name: str
    records: list[Record]


def prepare(
    records: str | Path | None,
    images: str | Path | None,
    root: str | Path,
    held_out: int,
    records_per_shard: int,
    threads: int,
) -> Path:
    """Write the missing shards and return their folder.

    Args:
        records: ShareGPT4V's json. If None, nothing is written, and the shards of an earlier run are used.
        images: folder with the folders coco, llava and sam.
        root: folder of the shards.
        held_out: number of records, the first of the json, in the selection split.
        records_per_shard: records of each shard.
        threads: threads that write shards.

    Raises:
        ValueError: if shards, records or pictures are missing, or the folder holds other shards.
    """
    folder = Path(root).expanduser()
    if records is None:
        if not any(folder.glob("train-*.tar")):
            raise ValueError(
                f"no ShareGPT4V shards in {folder}: write them with `python -m clipfix run=prepare data=sharegpt4v "
                "data.prepare.records=/path/to/share-captioner_coco_lcs_sam_1246k_1107.json "
                "data.prepare.images=/path/to/images`; for shards in another folder set data.prepare.root=/there, or "
                "data.prepare=null data.train=urls data.selection=urls"
            )
        info = json.loads((folder / "info.json").read_text()) if (folder / "info.json").exists() else {"shards": 0}
        if (there := len(list(folder.glob("*-*.json")))) < info["shards"]:
            log.warning("%s has %d of %d shards: run=prepare was stopped; run it again", folder, there, info["shards"])
        return folder
    source = Path(records).expanduser()
    if not source.is_file():
        raise ValueError(f"there is no {source}: set data.prepare.records to ShareGPT4V's json")
    if images is None or not (pictures := Path(images).expanduser()).is_dir():
        raise ValueError(
            f"{images} is no folder: set data.prepare.images to the folder that contains coco/, llava/ and sam/"
        )
    if held_out < 0 or min(records_per_shard, threads) < 1:
        raise ValueError(
            f"data.prepare: held_out is {held_out}, records_per_shard {records_per_shard} and threads {threads}: set "
            "held_out to 0 or more, the others to 1 or more"
        )
    print(f"Reading {source}")
    everything = read(source)
    if held_out >= len(everything):
        raise ValueError(
            f"data.prepare.held_out={held_out} leaves none of {len(everything)} records for training: lower it"
        )
    names = sorted({record.source for record in everything})
    if not any((pictures / name).is_dir() for name in names):
        raise ValueError(f"{pictures} has no folder {', '.join(names[:9])}: set data.prepare.images to their parent")

    shards = list(plan(everything, held_out, records_per_shard))
    info = {"bytes": source.stat().st_size, "records": len(everything), "shards": len(shards)}
    open_output_folder(folder, info | {"held_out": held_out, "records_per_shard": records_per_shard})
    missing = [shard for shard in shards if not finished(folder, shard.name)]
    if missing:
        # The work is reading and writing files, so threads suffice, and they share the records.
        with ThreadPool(threads) as pool:
            written = pool.imap_unordered(partial(write, folder, pictures), missing)
            there = len(shards) - len(missing)
            for _ in track(written, f"Writing {folder}", total=len(shards), completed=there):
                pass
        for leftover in folder.glob(".*.part"):  # drafts of a killed run
            leftover.unlink(missing_ok=True)
    summarize(folder, shards)
    return folder


def read(path: Path) -> list[Record]:
    """Return all records of the json; raise ValueError if it has another format."""
    try:
        with path.open(encoding="utf-8") as file:
            records = json.load(file)
    except ValueError as error:  # an incomplete download, or a Git LFS pointer
        raise ValueError(f"{path} is not json: {error}") from error
    if not isinstance(records, list) or not records:
        raise ValueError(f"{path} is not a list of records: set data.prepare.records to ShareGPT4V's json")
    return [parse(number, record, path) for number, record in enumerate(records)]


def parse(number: int, record: Any, path: Path) -> Record:
    """Return the picture and long caption of one record of the json; raise ValueError if it has another format."""
    try:
        image, turns = record["image"], record["conversations"]
        caption = next(turn["value"] for turn in turns if turn["from"] == "gpt") or ""
        if not image or not isinstance(image, str):
            raise TypeError
        # Source: Long-CLIP, train/sharegpt4v.py: line ends become spaces before the first ". " is searched.
        return Record(number, image, caption.replace("\n", " ").strip())
    except (KeyError, TypeError, AttributeError, StopIteration):
        layout = '{"image": path, "conversations": [{"from": "human", ...}, {"from": "gpt", "value": caption}]}'
        raise ValueError(f"record {number} of {path} is not {layout}: {str(record)[:200]}") from None


def open_output_folder(folder: Path, info: dict[str, int]) -> None:
    """Create the folder; raise ValueError if it holds shards of another json or with other settings."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "info.json"
    present = json.loads(path.read_text()) if path.exists() else None
    if present is None and not any(folder.glob("*.tar")):
        put_json(path, info)
    elif present != info:
        present = present or "shards without info.json"
        raise ValueError(f"{folder} holds {present}, not {info}: delete it or set another data.prepare.root")


def plan(records: list[Record], held_out: int, per_shard: int) -> Iterator[Shard]:
    """Yield the shards with their records. They depend on the json and the arguments alone, not on present pictures.

    Training records are shuffled. The json lists them source by source (its first 10,000 are all of SAM, according to
    LoTLIP, arXiv 2410.05249), and a shuffle buffer is much smaller than a source, so batches would otherwise contain
    COCO alone, then LLaVA alone. Long-CLIP shuffles all records too.
    """
    train = records[held_out:]
    Random(SEED).shuffle(train)
    for split, part in (("selection", records[:held_out]), ("train", train)):
        for index, start in enumerate(range(0, len(part), per_shard)):
            yield Shard(f"{split}-{index:05d}", part[start : start + per_shard])


def finished(folder: Path, name: str) -> bool:
    """Return whether a shard is complete. A shard without any picture has counts and no tar."""
    return (folder / f"{name}.json").exists() and (
        (folder / f"{name}.tar").exists() or not total(counts(folder, name))["written"]
    )


def write(folder: Path, images: Path, shard: Shard) -> None:
    """Write one shard and then its counts, both atomically."""
    outcomes: dict[str, Counter[str]] = {}
    tar_file = folder / f"{shard.name}.tar"
    with atomic_write(tar_file, may_vanish=True) as draft:
        with tarfile.open(draft, "x") as tar:
            for record in shard.records:
                outcomes.setdefault(record.source, Counter())[pack(tar, images, record)] += 1
        if not total(outcomes)["written"]:
            draft.unlink(missing_ok=True)
    put_json(folder / f"{shard.name}.json", outcomes)


def pack(tar: tarfile.TarFile, images: Path, record: Record) -> str:
    """Add one record to the shard and return its outcome.

    The picture is not decoded, because training skips and counts broken ones.
    """
    path = images / record.image
    suffix = path.suffix[1:].lower()
    if not path.is_file():
        return "absent"
    if suffix not in IMAGES:
        return "unusable"
    if not record.caption:
        return "no caption"
    text = json.dumps({"long": record.caption, "source": record.source}).encode()
    add_sample(tar, f"{record.number:07d}", {suffix: path.read_bytes(), "json": text})
    return "written"


def counts(folder: Path, name: str) -> dict[str, Counter[str]]:
    """Return the outcomes of the records of a complete shard, by source."""
    stored: dict[str, dict[str, int]] = json.loads((folder / f"{name}.json").read_text())
    return {source: Counter(outcomes) for source, outcomes in stored.items()}


def total(outcomes: dict[str, Counter[str]]) -> Counter[str]:
    """Return the sum over all sources."""
    return sum(outcomes.values(), Counter())


def summarize(folder: Path, shards: list[Shard]) -> None:
    """Print the outcomes of all records, from the counts beside the shards."""
    by_source: dict[str, Counter[str]] = {}
    by_split: Counter[str] = Counter()
    for shard in shards:
        outcomes = counts(folder, shard.name)
        by_split[shard.name.split("-")[0]] += total(outcomes)["written"]
        for source, count in outcomes.items():
            by_source.setdefault(source, Counter()).update(count)

    table = Table(title="Records by source", title_justify="left")
    table.add_column("source")
    for heading in ("records", *OUTCOMES):
        table.add_column(heading, justify="right")
    for source, count in [*sorted(by_source.items()), ("all", total(by_source))]:
        absent = f"{count['absent']} ({100 * count['absent'] / count.total():.1f} %)"
        cells = [str(count[outcome]) if outcome != "absent" else absent for outcome in OUTCOMES]
        table.add_row(source, str(count.total()), *cells)
    Console().print(table)

    tars = sorted(folder.glob("*.tar"))
    size = sum(tar.stat().st_size for tar in tars)
    print(
        f"{by_split['train']} records for training and {by_split['selection']} held out, "
        f"{len(tars)} shards in {folder}, {size} bytes ({decimal(size)})"
    )
    if not by_split["train"]:
        raise ValueError(
            f"no training record has its picture: delete {folder}, correct data.prepare.images and run again"
        )
    if not by_split["selection"]:
        print("No held-out record has its picture (the first of ShareGPT4V are SAM's): train with data.selection=null")
