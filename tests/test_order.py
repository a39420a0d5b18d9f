"""The order of samples is a function of (seed, pass, place), whatever the number of ranks and workers."""

import gzip
import io
import itertools
import pickle
import random
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from shards import encoded, numbered, pack, picture
from streams import BROKEN, shard_data
from torch.nn.parallel import DistributedDataParallel

from clipfix.data import index as indexing
from clipfix.data.index import index_of, quick_bounds
from clipfix.data.module import ShardData
from clipfix.data.order import Order
from clipfix.data.shards import expand, read_shard
from clipfix.system.files import add_sample

JOINED = 24  # samples of all ranks in a step
COUNTS = [11, 1, 30, 0, 17, 20]  # 79 samples: no multiple of anything


def ranks(folder: Path, world: int, workers: int) -> list[ShardData]:
    """Return the data of each rank; `joined` iterates them as those ranks would."""
    return [shard_data(str(folder), batch_size=JOINED // world, workers=workers, shuffle=10) for _ in range(world)]


def joined(monkeypatch: pytest.MonkeyPatch, data: list[ShardData], steps: int) -> list[dict[str, Any]]:
    """Return keys, texts, pictures of the joined batches, and record that all ranks trained on them."""
    parts = []
    for each in data:
        each.index()  # while `rank_of` still says one rank: there is nobody to broadcast to here
    for rank, each in enumerate(data):
        monkeypatch.setattr("clipfix.data.module.rank_of", lambda rank=rank: (rank, len(data)))
        parts.append(list(itertools.islice(each.train_dataloader(), steps)))
        for batch in parts[-1]:
            each.advance(batch)
    monkeypatch.undo()
    return [
        {
            "key": [key for batch in step for key in batch["key"]],
            "caption": [text for batch in step for text in batch["caption"]],
            "image": torch.cat([batch["image"] for batch in step]),
            "skipped": sum(batch["skipped"] for batch in step),
            "end": {batch["position"][0] for batch in step},
        }
        for step in zip(*parts, strict=True)
    ]


def same(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> bool:
    pictures = all(torch.equal(a.pop("image"), b["image"]) for a, b in zip(map(dict, one), other, strict=True))
    rest = [{k: v for k, v in step.items() if k != "image"} for step in (*one, *other)]
    return pictures and rest[: len(one)] == rest[len(one) :]


def spoil(folder: Path) -> None:
    """A quarter of the samples of one shard becomes unusable."""
    members: dict[str, dict[str, Any]] = {}
    for place, raw in enumerate(list(read_shard(str(folder / "00002.tar")))):
        good = {name: part for name, part in raw.items() if name[0] != "_"}
        members[raw["__key__"]] = list(BROKEN.values())[place % 3 + 1] if place % 4 == 0 else good
    pack(folder / "00002.tar", members)


@pytest.mark.parametrize("broken", [False, True])
def test_joined_batches_are_the_same_on_any_number_of_ranks_and_workers(
    broken: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbered(tmp_path, COUNTS)
    if broken:
        spoil(tmp_path)
    alone = joined(monkeypatch, ranks(tmp_path, 1, 0), 8)
    assert sum(step["skipped"] for step in alone) > 10 if broken else not any(step["skipped"] for step in alone)
    for world, workers in ((2, 0), (3, 0), (4, 1), (8, 0), (1, 3), (2, 2)):
        assert same(joined(monkeypatch, ranks(tmp_path, world, workers), 8), alone)


def test_a_run_goes_on_at_any_number_of_ranks_and_workers_with_the_next_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """4 ranks to 2 to 4, 4 workers to none, within a pass and over its end: each sample once a pass."""
    keys = numbered(tmp_path, COUNTS)
    alone = joined(monkeypatch, ranks(tmp_path, 1, 0), 10)
    found: list[dict[str, Any]] = []
    state: dict[str, Any] | None = None
    for world, workers, steps in ((4, 0, 2), (2, 0, 3), (4, 0, 1), (1, 4, 2), (1, 0, 2)):
        data = ranks(tmp_path, world, workers)
        for each in data:
            if state:
                each.load_state_dict(state)
        found += joined(monkeypatch, data, steps)
        states = [each.state_dict() for each in data]
        assert all(each == states[0] for each in states)
        state = states[0]
        assert state == {"number": JOINED * len(found), "samples": len(keys)}  # all of it
    assert same(found, alone)
    order = [key for step in found for key in step["key"]]
    for start in range(0, len(order) - len(keys), len(keys)):
        assert sorted(order[start : start + len(keys)]) == keys


def steps_of(rank: int, world: int, folder: str, start: str | None, steps: int, out: str) -> None:
    """Train one matrix in fp64 by DDP on a contrastive loss over the joined batch; save losses and position."""
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{out}.store", rank=rank, world_size=world)
    torch.set_num_threads(1)
    model = torch.nn.Linear(3, 4, bias=False).double()
    data = shard_data(folder, batch_size=JOINED // world, shuffle=10)
    saved = torch.load(start, weights_only=True) if start else None
    with torch.no_grad():
        model.weight.copy_(saved["weight"] if saved else torch.linspace(-1, 1, 12).double().view(4, 3))
    if saved:
        data.load_state_dict(saved["data"])
    wrapped = DistributedDataParallel(model) if world > 1 else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses = []
    for batch in itertools.islice(data.train_dataloader(), steps):
        data.advance(batch)
        features = wrapped(batch["image"].double().mean(dim=(2, 3)) / 255)
        loss = (features * torch.tensor([int(key) % 7 for key in batch["key"]]).unsqueeze(1)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total = loss.detach().clone()
        if world > 1:
            dist.all_reduce(total)
        losses.append(total / world)
    state = data.state_dict()
    if rank == 0:
        torch.save({"losses": torch.stack(losses), "weight": model.weight.detach(), "data": state}, out)
    if world > 1:
        dist.destroy_process_group()


def test_losses_of_four_two_and_four_ranks_are_those_of_one_in_fp64(tmp_path: Path) -> None:
    numbered(tmp_path / "shards", COUNTS)
    folder, losses, start = str(tmp_path / "shards"), [], None
    steps_of(0, 1, folder, None, 7, str(tmp_path / "alone"))
    for part, (world, steps) in enumerate(((4, 2), (2, 3), (4, 2))):
        out = str(tmp_path / f"part{part}")
        torch.multiprocessing.start_processes(
            steps_of, (world, folder, start, steps, out), nprocs=world, start_method="fork"
        )
        losses.append(torch.load(out, weights_only=True)["losses"])
        start = out
    alone, last = (torch.load(path, weights_only=True) for path in (tmp_path / "alone", start))
    assert alone["losses"].dtype == torch.float64
    torch.testing.assert_close(torch.cat(losses), alone["losses"], rtol=1e-6, atol=0)
    torch.testing.assert_close(last["weight"], alone["weight"], rtol=1e-6, atol=1e-12)
    assert last["data"] == alone["data"]


def test_a_rank_reads_and_decodes_only_what_it_delivers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    numbered(tmp_path, COUNTS)
    decoded: list[str] = []
    read: list[int] = []
    decode, one = indexing.one_sample, "clipfix.data.stream.decode"
    original = __import__("clipfix.data.stream", fromlist=["decode"]).decode
    monkeypatch.setattr(one, lambda raw: decoded.append(raw["__key__"]) or original(raw))
    monkeypatch.setattr(indexing, "one_sample", lambda data, url: read.append(len(data)) or decode(data, url))
    data = shard_data(str(tmp_path), batch_size=6, shuffle=10)
    data.index()
    monkeypatch.setattr("clipfix.data.module.rank_of", lambda: (1, 4))
    batches = list(itertools.islice(data.train_dataloader(), 3))
    assert sorted(decoded) == sorted(key for batch in batches for key in batch["key"])
    assert len(read) <= len(decoded) + 10  # and the rest of a window


@pytest.mark.parametrize("shuffle", [0, 1, 10, 64, 200, 2000])
def test_an_order_takes_each_sample_once_a_pass(shuffle: int) -> None:
    counts = [random.Random(0).randrange(60) for _ in range(20)]
    first = [0, *itertools.accumulate(counts)]
    order = Order(first, 0, shuffle)
    passes = [[order(number, place) for place in range(first[-1])] for number in (0, 1)]
    for taken in passes:
        assert sorted(taken) == list(range(first[-1]))
    other = Order(first, 1, shuffle)
    assert passes[0] != passes[1] != [other(1, place) for place in range(first[-1])]
    assert Order(first, 0, shuffle)(1, 7) == passes[1][7]  # without what came before


def test_a_window_mixes_short_runs_of_many_shards() -> None:
    """Runs, because those are read in a row: 16 parts of the pass, and of each 2000 / 16 samples."""
    order = Order(list(range(0, 100_001, 1000)), seed=0, shuffle=2000)
    window = np.sort([order(0, place) for place in range(2000, 4000)])
    assert 16 <= 1 + (np.diff(window) > 1).sum() <= 2 * 16
    batch = [order(0, place) // 1000 for place in range(2000, 2100)]
    assert len(set(batch)) >= 16


def archive(path: Path, how: str) -> Path:
    """An archive with more than one kind of header."""
    formats = {"gnu": tarfile.GNU_FORMAT, "ustar": tarfile.USTAR_FORMAT}
    with tarfile.open(path, "w", format=formats.get(how, tarfile.PAX_FORMAT)) as tar:
        for number in range(4):
            key = f"{'long' * 40}/{number}" if how in ("long", "gnu") else f"folder/{number}"
            if how == "folders":
                folder = tarfile.TarInfo(f"d{number}")
                folder.type = tarfile.DIRTYPE
                tar.addfile(folder)
            for suffix in ("png", "cls.txt", "json"):
                member = tarfile.TarInfo(f"{key}.{suffix}")
                data = suffix.encode() * (number * 300 + 1)
                member.size = len(data)
                member.mtime = 1.5 if how == "times" else 1
                tar.addfile(member, io.BytesIO(data))
        add_sample(tar, "no_suffix_but", {"txt": b"x"})
    return path


@pytest.mark.parametrize("how", ["plain", "ustar", "gnu", "long", "times", "folders"])
def test_the_index_holds_the_samples_that_reading_the_shard_gives(how: str, tmp_path: Path) -> None:
    path = archive(tmp_path / "0.tar", how)
    index = index_of([str(path)])
    assert [raw for _, raw in index.read(range(index.samples), set())] == list(read_shard(str(path)))
    assert index.samples == 5
    with path.open("rb") as file:
        if how in ("plain", "ustar", "times"):
            assert len(quick_bounds(file.fileno())) == 5
        else:
            with pytest.raises(indexing.UnusualHeader):
                quick_bounds(file.fileno())


def test_compressed_and_remote_shards_are_streamed(tmp_path: Path) -> None:
    keys = numbered(tmp_path, [6])
    path = tmp_path / "00000.tar"
    assert index_of([str(path), "https://host/0.tar"]) is None
    (tmp_path / "zipped.tar").write_bytes(gzip.compress(path.read_bytes()))
    data = shard_data(str(tmp_path / "zipped.tar"), batch_size=6)
    assert data.index() is None
    assert sorted(next(iter(data.train_dataloader()))["key"]) == keys


def test_the_index_of_large_data_is_kept_until_a_shard_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(indexing, "KEPT_FROM", 5)
    numbered(tmp_path / "shards", [3, 4])
    shards = expand(str(tmp_path / "shards"))
    made = index_of(shards)
    with monkeypatch.context() as patch:
        patch.setattr(indexing, "bounds_of", None)  # not called
        kept = index_of(shards)
    assert all(np.array_equal(getattr(kept, name), getattr(made, name)) for name in ("first", "starts", "stops"))
    next((tmp_path / "cache").rglob("*.npz")).write_bytes(b"damaged")
    assert index_of(shards).samples == 7
    pack(Path(shards[0]), {"a": {"png": encoded(picture(0)), "txt": "x"}})
    assert index_of(shards).samples == 5


def test_a_shard_that_is_overwritten_during_a_run_gives_broken_samples(tmp_path: Path) -> None:
    numbered(tmp_path, [4, 4])
    data = shard_data(str(tmp_path), batch_size=8, shuffle=0)
    data.index()
    (tmp_path / "00001.tar").write_bytes(b"<html>404</html>")
    batch = next(iter(data.train_dataloader()))
    assert set(batch["key"]) == {f"{number:05d}" for number in range(4)}
    assert batch["skipped"] >= 4


def test_workers_are_sent_the_order_without_its_caches(tmp_path: Path) -> None:
    order = Order([0, 5, 9], 0, 4)
    places = [order(0, place) for place in range(9)]
    assert [pickle.loads(pickle.dumps(order))(0, place) for place in range(9)] == places


def test_the_order_is_that_of_every_version() -> None:
    """A checkpoint stores a number alone, so another order would repeat samples and leave others out."""
    plain, shuffled = Order([0, 3, 3, 8, 12], seed=5, shuffle=0), Order([0, 3, 3, 8, 12], seed=5, shuffle=6)
    assert [plain(2, place) for place in range(12)] == [3, 4, 5, 6, 7, 8, 9, 10, 11, 0, 1, 2]
    assert [shuffled(2, place) for place in range(12)] == [6, 3, 7, 5, 4, 8, 11, 1, 9, 2, 0, 10]
