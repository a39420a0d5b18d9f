"""ShareGPT4V's json and a folder of pictures in, WebDataset shards out: `python -m clipfix run=prepare`.

Beside each shard lies a small json that counts what became of its records. It is written last, so a killed run leaves
whole shards with their counts, and the next run makes the others.
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

from clipfix.system.files import add_sample, put_json, whole

log = logging.getLogger(__name__)

# Nothing here imports torch: packing must run on a machine that only holds the data.

IMAGES = ("jpg", "jpeg", "png", "webp")  # what decoding.py reads
FATES = ("written", "absent", "unusable", "no caption")  # a record has the first that fits, from absent on
SEED = 0  # of the order of the training records


class Record(NamedTuple):
    number: int  # its place in the json, and so its key in the shard
    image: str
    caption: str

    @property
    def source(self) -> str:
        """coco, llava or sam."""
        return self.image.split("/", 1)[0]


class Shard(NamedTuple):
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
    """The folder of shards; those that are not there yet are written, from `records` (ShareGPT4V's json) and `images`.

    Without `records` nothing is written: training then uses the shards that an earlier run made.
    """
    folder = Path(root).expanduser()
    if records is None:
        if not any(folder.glob("train-*.tar")):
            raise ValueError(
                f"no ShareGPT4V shards in {folder}: make them with `python -m clipfix run=prepare data=sharegpt4v "
                "data.prepare.records=/path/to/share-captioner_coco_lcs_sam_1246k_1107.json "
                "data.prepare.images=/path/to/images`; if they lie elsewhere, data.prepare.root=/there, "
                "or data.prepare=null data.train=urls data.selection=urls"
            )
        info = json.loads((folder / "info.json").read_text()) if (folder / "info.json").exists() else {"shards": 0}
        if (there := len(list(folder.glob("*-*.json")))) < info["shards"]:
            log.warning(
                "%s has %d of %d shards: run=prepare was stopped, start it again", folder, there, info["shards"]
            )
        return folder
    source = Path(records).expanduser()
    if not source.is_file():
        raise ValueError(f"there is no {source}: set data.prepare.records to ShareGPT4V's json")
    if images is None or not (pictures := Path(images).expanduser()).is_dir():
        raise ValueError(f"{images} is no folder: set data.prepare.images to the one that holds coco/, llava/ and sam/")
    if held_out < 0 or min(records_per_shard, threads) < 1:
        raise ValueError("data.prepare: held_out is at least 0, records_per_shard and threads at least 1")
    print(f"reading {source}")
    everything = read(source)
    if held_out >= len(everything):
        raise ValueError(f"data.prepare.held_out={held_out} leaves none of {len(everything)} records to train on")
    names = sorted({record.source for record in everything})
    if not any((pictures / name).is_dir() for name in names):
        raise ValueError(f"{pictures} has no folder {', '.join(names[:9])}: data.prepare.images is the one above them")

    shards = list(plan(everything, held_out, records_per_shard))
    info = {"bytes": source.stat().st_size, "records": len(everything), "shards": len(shards)}
    claim(folder, info | {"held_out": held_out, "records_per_shard": records_per_shard})
    missing = [shard for shard in shards if not finished(folder, shard.name)]
    if missing:
        # Threads, as the work is reading and writing files; they share the records, which processes would copy.
        with ThreadPool(threads) as pool:
            written = pool.imap_unordered(partial(write, folder, pictures), missing)
            there = len(shards) - len(missing)
            for _ in track(written, f"packing {folder}", total=len(shards), completed=there):
                pass
        for leftover in folder.glob(".*.part"):  # of a run that was killed
            leftover.unlink(missing_ok=True)
    summarize(folder, shards)
    return folder


def read(path: Path) -> list[Record]:
    """All records of the json, checked."""
    try:
        with path.open(encoding="utf-8") as file:
            found = json.load(file)
    except ValueError as error:  # cut off while downloading, or a pointer to the file instead of the file
        raise ValueError(f"{path} is not json: {error}") from error
    if not isinstance(found, list) or not found:
        raise ValueError(f"{path} is not a list of records, as ShareGPT4V's json is")
    return [parse(number, record, path) for number, record in enumerate(found)]


def parse(number: int, record: Any, path: Path) -> Record:
    """Picture and long caption of one record."""
    try:
        image, turns = record["image"], record["conversations"]
        caption = next(turn["value"] for turn in turns if turn["from"] == "gpt") or ""
        if not image or not isinstance(image, str):
            raise TypeError
        # Source: Long-CLIP, train/sharegpt4v.py, replaces line ends by blanks before it looks for the first ". ".
        return Record(number, image, caption.replace("\n", " ").strip())
    except (KeyError, TypeError, AttributeError, StopIteration):
        layout = '{"image": path, "conversations": [{"from": "human", ...}, {"from": "gpt", "value": caption}]}'
        raise ValueError(f"record {number} of {path} is not {layout}: {str(record)[:200]}") from None


def claim(folder: Path, info: dict[str, int]) -> None:
    """Makes the folder, or checks that what it holds was begun with the same json and numbers."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "info.json"
    found = json.loads(path.read_text()) if path.exists() else None
    if found is None and not any(folder.glob("*.tar")):
        put_json(path, info)
    elif found != info:
        found = found or "shards without info.json"
        raise ValueError(f"{folder} holds {found}, asked for {info}: delete it or set another data.prepare.root")


def plan(records: list[Record], held_out: int, per_shard: int) -> Iterator[Shard]:
    """Which records go into which shard: a function of the json and these numbers alone, whichever pictures are there.

    Those to train on come in a mixed order: the json lists them source by source (its first 10,000 are all SAM's,
    says LoTLIP, arXiv 2410.05249), and a shuffle buffer is much smaller than a source, so batches would be all COCO,
    then all LLaVA. Long-CLIP shuffles all records.
    """
    train = records[held_out:]
    Random(SEED).shuffle(train)
    for split, part in (("selection", records[:held_out]), ("train", train)):
        for index, start in enumerate(range(0, len(part), per_shard)):
            yield Shard(f"{split}-{index:05d}", part[start : start + per_shard])


def finished(folder: Path, name: str) -> bool:
    """A range without any picture leaves its counts and no tar."""
    return (folder / f"{name}.json").exists() and (
        (folder / f"{name}.tar").exists() or not total(counts(folder, name))["written"]
    )


def write(folder: Path, images: Path, shard: Shard) -> None:
    """One shard and its counts, each under another name until complete."""
    fates: dict[str, Counter[str]] = {}
    tar_file = folder / f"{shard.name}.tar"
    with whole(tar_file, swept=True) as draft:
        with tarfile.open(draft, "x") as tar:
            for record in shard.records:
                fates.setdefault(record.source, Counter())[pack(tar, images, record)] += 1
        if not total(fates)["written"]:
            draft.unlink(missing_ok=True)
    put_json(folder / f"{shard.name}.json", fates)


def pack(tar: tarfile.TarFile, images: Path, record: Record) -> str:
    """Adds one record; says what became of it. The picture is not decoded: training skips and counts broken ones."""
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
    """What became of a finished shard's records, by source."""
    found: dict[str, dict[str, int]] = json.loads((folder / f"{name}.json").read_text())
    return {source: Counter(fates) for source, fates in found.items()}


def total(fates: dict[str, Counter[str]]) -> Counter[str]:
    """The same over all sources."""
    return sum(fates.values(), Counter())


def summarize(folder: Path, shards: list[Shard]) -> None:
    """Prints what became of the records, from the counts beside the shards."""
    by_source: dict[str, Counter[str]] = {}
    by_split: Counter[str] = Counter()
    for shard in shards:
        fates = counts(folder, shard.name)
        by_split[shard.name.split("-")[0]] += total(fates)["written"]
        for source, found in fates.items():
            by_source.setdefault(source, Counter()).update(found)

    table = Table(title="Records by source", title_justify="left")
    table.add_column("source")
    for heading in ("records", *FATES):
        table.add_column(heading, justify="right")
    for source, found in [*sorted(by_source.items()), ("all", total(by_source))]:
        absent = f"{found['absent']} ({100 * found['absent'] / found.total():.1f} %)"
        cells = [str(found[fate]) if fate != "absent" else absent for fate in FATES]
        table.add_row(source, str(found.total()), *cells)
    Console().print(table)

    tars = sorted(folder.glob("*.tar"))
    size = sum(tar.stat().st_size for tar in tars)
    print(
        f"{by_split['train']} records to train on and {by_split['selection']} held out, "
        f"{len(tars)} shards in {folder}, {size} bytes ({decimal(size)})"
    )
    if not by_split["train"]:
        raise ValueError(
            f"no record to train on has its picture: delete {folder}, correct data.prepare.images and start again"
        )
    if not by_split["selection"]:
        print("No held-out record has its picture (the first of ShareGPT4V are SAM's): train with data.selection=null")
