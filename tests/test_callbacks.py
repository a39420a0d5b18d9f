"""The progress bar; and steps that are not finite: skipped, counted, and at last a stop with the batch saved."""

import os
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import rich
import torch
from ports import free_port
from torch.utils.data import DataLoader

from clipfix.training.callbacks import Finite, Progress, metrics_text

INF, NAN = float("inf"), float("nan")


class Line(L.LightningModule):
    """Fits w . x = 0; AdamW, whose moments and decay would move a weight of zero gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(3))
        self.weights: list[torch.Tensor] = []  # after each optimizer step

    def training_step(self, batch: dict[str, Any], index: int) -> torch.Tensor:
        return (batch["x"][self.global_rank % len(batch["x"])] * self.weight).sum() ** 2

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.1, weight_decay=0.1)
        optimizer.register_step_post_hook(lambda *_: self.weights.append(self.weight.detach().clone()))
        return optimizer


def fit(folder: Path, xs: list[list[float]], patience: int = 3, resume: Path | None = None, **settings: Any) -> Line:
    """Each of `xs` is a micro-batch: one number a rank."""
    batches = [{"key": [f"{n}"], "x": torch.tensor(x)} for n, x in enumerate(xs)]
    finite = Finite(str(folder), patience)
    trainer = L.Trainer(
        accelerator="cpu", logger=False, callbacks=[finite], enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder, **{"max_epochs": 1, **settings},
    )  # fmt: skip
    module = Line()
    trainer.fit(module, DataLoader(batches, batch_size=None), ckpt_path=resume, weights_only=True)
    module.counted = trainer.callback_metrics["perf/skipped_steps"]
    trainer.save_checkpoint(folder / "last.ckpt")
    return module


@pytest.mark.parametrize("bad", [NAN, INF, 1e30])
def test_a_step_that_is_not_finite_changes_nothing(bad: float, tmp_path: Path) -> None:
    found = fit(tmp_path, [[1.0], [2.0], [bad], [3.0]])
    expected = fit(tmp_path, [[1.0], [2.0], [3.0]])
    assert torch.equal(found.weights[2], found.weights[1])
    assert torch.equal(found.weights[3], expected.weights[2])  # moments and their count stayed too
    assert found.counted == 1
    assert expected.counted == 0


def test_one_bad_micro_batch_takes_its_whole_step(tmp_path: Path) -> None:
    found = fit(tmp_path, [[1.0], [2.0], [NAN], [5.0], [3.0], [4.0]], accumulate_grad_batches=2)
    expected = fit(tmp_path, [[1.0], [2.0], [3.0], [4.0]], accumulate_grad_batches=2)
    assert torch.equal(found.weights[2], expected.weights[1])
    assert found.counted == 1


def test_so_many_in_a_row_end_the_run_with_the_batch_that_spoiled_it(tmp_path: Path) -> None:
    once_more = [[1.0], [1.0], [NAN], [1.0]] * 5  # every second step
    assert fit(tmp_path, once_more, patience=2, accumulate_grad_batches=2).counted == 5
    xs = [[1.0], [1.0], [NAN], [1.0], [INF], [1.0], [1.0], [1.0]]
    with pytest.raises(ValueError, match=r"in 2 steps in a row, the last at step 2; .*Lower method\.optimizer\.lr"):
        fit(tmp_path, xs, patience=2, accumulate_grad_batches=2)
    kept = torch.load(tmp_path / "nonfinite-0.pt", weights_only=True)
    assert kept == {"key": ["4"], "x": torch.tensor([INF])}


def test_a_resumed_run_counts_on(tmp_path: Path) -> None:
    fit(tmp_path, [[NAN], [NAN]])
    assert fit(tmp_path, [[1.0], [NAN]], max_epochs=2, resume=tmp_path / "last.ckpt").counted == 3


def rank(number: int, folder: str, store: str) -> None:
    """Rank 1 alone has the bad number; both must do the same."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store, "WORLD_SIZE": "2", "NODE_RANK": "0"}
    os.environ |= {"LOCAL_RANK": str(number), "RANK": str(number)}
    xs = [[1.0, 1.0], [2.0, NAN], [3.0, 3.0]]
    module = fit(Path(folder), xs, devices=2, strategy="ddp", use_distributed_sampler=False)
    torch.save((module.weights, module.counted), f"{folder}/{number}.pt")
    with pytest.raises(ValueError, match="in 2 steps in a row"):
        fit(Path(folder), [[1.0, NAN]] * 3, 2, devices=2, strategy="ddp", use_distributed_sampler=False)


def test_one_rank_that_sees_it_is_enough(tmp_path: Path) -> None:
    """Gradients are averaged before they are asked, so nothing is sent for this."""
    torch.multiprocessing.start_processes(rank, (str(tmp_path), str(free_port())), nprocs=2, start_method="fork")
    (first, counted), (second, also) = (torch.load(tmp_path / f"{number}.pt") for number in range(2))
    expected = fit(tmp_path, [[1.0], [3.0]]).weights
    for weights in (first, second):
        assert torch.equal(weights[1], weights[0])
        torch.testing.assert_close(weights[2], expected[1])
    assert counted == also == 1
    assert {path.name for path in tmp_path.glob("nonfinite-*.pt")} == {"nonfinite-0.pt", "nonfinite-1.pt"}


@pytest.mark.parametrize("width", [50, 80])
def test_the_bar_fits_on_one_line(width: int, capsys: pytest.CaptureFixture[str]) -> None:
    rich.reconfigure(width=width)
    progress = Progress()
    metrics = {"train/loss": 0.693147, "val/loss": 0.712, "selection/pairs/mean": 45.1234, "selection/other": 1.0}
    progress.bar.update(progress.task, total=100_000, completed=12_345, metrics=metrics_text(metrics))
    rich.get_console().print(progress.bar.get_renderable())
    rich.reconfigure()
    (line,) = capsys.readouterr().out.splitlines()
    assert len(line) <= width
    assert "12345/100000" in line
    assert ("loss 0.693 val/loss 0.712" in line) == (width == 80)


def test_the_bar_counts_the_batches_of_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = L.Trainer(
        accelerator="cpu", logger=False, callbacks=[Progress()], enable_checkpointing=False, max_steps=3, max_epochs=-1,
        accumulate_grad_batches=2, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    batches = [{"x": torch.ones(1)} for _ in range(10)]
    trainer.fit(Line(), DataLoader(batches, batch_size=None), weights_only=True)
    assert " 6/6 " in capsys.readouterr().out
