"""A stopped stream goes on with exactly the next batch."""

import itertools
import random
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from shards import encoded, numbered, pack, picture
from streams import BROKEN, shard_data

from clipfix.data.stream import start_of_pass


def with_broken_samples(folder: Path) -> str:
    """Five shards, a third of their samples broken, one of them cut off."""
    rng = random.Random(0)
    for shard in range(5):
        members: dict[str, dict[str, Any]] = {}
        for number in range(6):
            broken = rng.choice(list(BROKEN.values())[:6]) if rng.random() < 0.33 else None
            members[f"{shard}{number}"] = broken or {"png": encoded(picture(number)), "txt": f"{shard}{number}"}
        pack(folder / f"{shard}.tar", members)
    path = folder / "3.tar"
    path.write_bytes(path.read_bytes()[:-4000])
    return str(folder)


def facts(batch: dict[str, Any]) -> tuple[Any, ...]:
    return batch["key"], batch["caption"], tuple(batch["position"]), batch["skipped"], batch["image"].sum().item()


def streamed(folder: str) -> str:
    """Return the same shards as commands, which cannot be indexed."""
    return f"pipe:cat {folder}/{{0..4}}.tar"


@pytest.mark.parametrize("kind", ["local", "streamed"])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_stopped_stream_goes_on_with_exactly_the_next_batch(kind: str, workers: int, tmp_path: Path) -> None:
    folder = with_broken_samples(tmp_path / "shards")
    if kind == "streamed":
        folder = streamed(folder)
    whole = [
        facts(b) for b in itertools.islice(shard_data(folder, workers=workers, allow_pipe=True).train_dataloader(), 20)
    ]
    assert max(position[1] for _, _, position, _, _ in whole) > 0  # several passes
    assert sum(skipped for *_, skipped, _ in whole) > 5
    for stop in (1, 4, 13):
        stopped = shard_data(folder, workers=workers, allow_pipe=True)
        for batch in itertools.islice(stopped.train_dataloader(), stop):
            stopped.advance(batch)
        torch.save(stopped.state_dict(), tmp_path / "state")
        resumed = shard_data(folder, workers=workers, allow_pipe=True)
        resumed.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
        rest = [facts(batch) for batch in itertools.islice(resumed.train_dataloader(), 20 - stop)]
        assert rest == whole[stop:]


@pytest.mark.parametrize("workers", [0, 2])
def test_iterating_again_goes_on_where_training_stands(workers: int, tmp_path: Path) -> None:
    numbered(tmp_path, [10, 10, 10])
    whole = [facts(b) for b in itertools.islice(shard_data(str(tmp_path), workers=workers).train_dataloader(), 9)]
    data = shard_data(str(tmp_path), workers=workers)
    loader, again = data.train_dataloader(), []
    for _ in range(3):
        for batch in itertools.islice(loader, 3):
            again.append(facts(batch))
            data.advance(batch)
    assert again == whole


def test_of_streamed_shards_another_number_of_workers_starts_the_next_pass(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    numbered(tmp_path, [10, 10])
    where = f"pipe:cat {tmp_path}/0000{{0..1}}.tar"
    data = shard_data(where, allow_pipe=True)
    for batch in itertools.islice(data.train_dataloader(), 8):  # 24 of 20 samples: in the second pass
        data.advance(batch)
    resumed = shard_data(where, workers=2, allow_pipe=True)
    resumed.load_state_dict(data.state_dict())
    assert "the number of ranks or data.workers changed" in caplog.text.lower()
    assert "start of pass 2" in caplog.text
    assert resumed.progress == start_of_pass(2, number=2)


def test_a_checkpoint_of_other_shards_or_of_an_older_version_starts_the_next_pass(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    numbered(tmp_path / "a", [10, 10])
    numbered(tmp_path / "b", [10, 10, 5])
    older = {"ranks": [{"turn": 0, "positions": [[1, 4]]}]}
    other = {"number": 24, "samples": 20}
    local, piped = str(tmp_path / "b"), f"pipe:cat {tmp_path}/b/0000{{0..2}}.tar"
    for state, where, reason, progress in (
        (older, local, "older version", {"number": 50, "samples": 25}),
        (other, local, "written on 20 samples in local shards, and now it is 25", {"number": 50, "samples": 25}),
        (other, piped, "now it is streamed", start_of_pass(0, number=2)),
    ):
        caplog.clear()
        resumed = shard_data(where, allow_pipe=True)
        resumed.load_state_dict(state)
        (line,) = caplog.messages
        assert reason in line
        assert "start of pass 2" in line
        assert resumed.progress == progress


class Recorder(L.LightningModule):
    """Trains one number on batches and writes down which."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.trained: list[tuple[Any, ...]] = []

    def training_step(self, batch: dict[str, Any], index: int) -> torch.Tensor:
        self.trained.append(facts(batch))
        return self.weight * batch["image"].mean()

    def validation_step(self, batch: dict[str, Any], index: int) -> None: ...

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("workers", [0, 2])
def test_lightning_resumes_with_the_batch_after_the_checkpoint(workers: int, tmp_path: Path) -> None:
    folder = with_broken_samples(tmp_path / "shards")

    def fit(steps: int, resume: Path | None = None) -> list[tuple[Any, ...]]:
        module = Recorder()
        trainer = L.Trainer(
            max_steps=steps,
            accelerator="cpu",
            logger=False,
            callbacks=[ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=5, save_top_k=-1)],
            val_check_interval=3,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        data = shard_data(folder, selection=str(Path(folder) / "0.tar"), workers=workers)
        trainer.fit(module, data, ckpt_path=resume, weights_only=True)
        return module.trained

    whole = fit(12)
    assert fit(12, resume=tmp_path / "step=5.ckpt") == whole[5:]


def two_ranks(rank: int, folder: str, store: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    data = shard_data(streamed(folder), allow_pipe=True)
    keys = []
    for batch in itertools.islice(data.train_dataloader(), 2 + rank):  # ranks may stand anywhere
        data.advance(batch)
        keys += batch["key"]
    state = data.state_dict()
    assert state["ranks"][rank] == data.progress
    resumed = shard_data(streamed(folder), allow_pipe=True)
    resumed.load_state_dict(state)
    assert resumed.progress == data.progress
    gathered: list[Any] = [None, None]
    dist.all_gather_object(gathered, (state, keys))
    assert gathered[0][0] == gathered[1][0]  # one checkpoint serves all ranks
    assert not set(gathered[0][1]) & set(gathered[1][1])
    dist.destroy_process_group()


def test_a_checkpoint_holds_where_every_rank_of_a_stream_stands(tmp_path: Path) -> None:
    numbered(tmp_path / "numbered", [9, 9, 9, 9, 9])
    (tmp_path / "shards").mkdir()
    for path in (tmp_path / "numbered").glob("*.tar"):
        path.rename(tmp_path / "shards" / f"{int(path.stem)}.tar")
    arguments = (str(tmp_path / "shards"), str(tmp_path / "store"))
    torch.multiprocessing.start_processes(two_ranks, arguments, nprocs=2, start_method="fork")
