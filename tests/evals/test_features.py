"""Ranks that share a scoring get what one rank alone gets, bit for bit."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image
from shards import encoded, pack

from clipfix.data.sets import Source
from clipfix.evals import features as module
from clipfix.evals.embed import PatchPooling
from clipfix.evals.features import scoring
from clipfix.models.clip import Backbone

WORLD, BATCH = 3, 4
PICTURES = 21  # with the broken one 22: five whole batches and a rest of two
TEXTS = [f"{'very ' * (i % 5)}long text {i}" for i in range(14)]


@dataclass(frozen=True)
class Files(Source):
    """Pictures of a folder, each named twice."""

    def needs(self):
        return [self.folder]

    def read(self) -> Iterator[dict]:
        for path in sorted(self.folder.glob("*.png")) * 2:
            yield {"key": path.stem, "image": path, "txt": path.stem, "json": {}}


def picture(i: int) -> Image.Image:
    return Image.effect_noise((40, 40), 40 + i).convert("RGB")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A shard with one broken picture in its midst, and a folder of files."""
    folder = tmp_path_factory.mktemp("pictures")
    samples = {f"{i:03d}": {"png": encoded(picture(i)), "txt": f"picture {i}", "json": {}} for i in range(PICTURES)}
    samples["005x"] = {"png": b"none", "txt": "broken", "json": {}}
    pack(folder / "test.tar", dict(sorted(samples.items())))
    (folder / "files").mkdir()
    for i in range(9):
        picture(100 + i).save(folder / "files" / f"{i}.png")
    return folder


def asked(clip_folder: str, folder: Path) -> dict:
    """Everything that one can ask of features, of a small real model."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    backbone = Backbone(clip_folder, "random")
    local = PatchPooling(tokens=3, normalized=True, seed=0)
    files = Files(str(folder / "files"), "fetch it", 18)
    with scoring(backbone) as features:
        shard = features.images(str(folder / "test.tar"))
        return {
            "shard": shard,
            "files": features.images(files),
            "with patches": features.images(files, pooling=local),
            "again": features.images(str(folder / "test.tar")),
            "texts": features.texts(TEXTS),
            "one more": features.texts([*TEXTS[3:5], "a new one"]),
        }


def worker(rank: int, clip_folder: str, folder: Path, out: Path) -> None:
    module.BATCH = BATCH
    dist.init_process_group("gloo", init_method=f"file://{out}/store", rank=rank, world_size=WORLD)
    embedded = []
    forward = Backbone.encode_image
    Backbone.encode_image = lambda self, images: embedded.append(len(images)) or forward(self, images)
    torch.save({**asked(clip_folder, folder), "embedded": sum(embedded)}, out / f"{rank}.pt")
    Backbone.encode_image = forward

    # The second batch, with the broken picture, is dealt to rank 1 alone.
    broken = Files(str(out / "broken"), "fetch it", None)
    with scoring(Backbone(clip_folder, "random")) as features:
        try:
            features.images(broken)
        except ValueError as error:
            (out / f"{rank}.txt").write_text(str(error))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def together(clip_folder, folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("ranks")
    (out / "broken").mkdir()
    for i in range(7):
        picture(i).save(out / "broken" / f"{i}.png")
    (out / "broken" / "5.png").write_bytes(b"none")
    mp.start_processes(worker, (clip_folder, folder, out), nprocs=WORLD, start_method="fork")
    return out


def test_every_rank_gets_the_features_of_one(clip_folder, folder, together, monkeypatch):
    monkeypatch.setattr(module, "BATCH", BATCH)
    alone = asked(clip_folder, folder)
    assert len(alone["shard"][1]) == PICTURES
    assert "005x" not in [sample["key"] for sample in alone["shard"][1]]
    for rank in range(WORLD):
        found = torch.load(together / f"{rank}.pt", weights_only=True)
        for name in ("shard", "files", "with patches", "again"):
            assert torch.equal(found[name][0], alone[name][0]), name
            assert found[name][1] == alone[name][1], name
        assert torch.equal(found["texts"], alone["texts"])
        assert torch.equal(found["one more"], alone["one more"])


def test_each_picture_is_embedded_by_one_rank(together):
    """Dealt a batch at a time: of 22 samples 8, 7 (one is broken) and 6, of nine files, twice, 4, 4 and 1."""
    counts = [torch.load(together / f"{rank}.pt", weights_only=True)["embedded"] for rank in range(WORLD)]
    assert counts == [8 + 4, 7 + 4, 6 + 1]


def test_what_one_rank_cannot_read_stops_all(together):
    told = [(together / f"{rank}.txt").read_text() for rank in range(WORLD)]
    assert "5.png cannot be read" in told[0]
    assert told == told[:1] * WORLD
