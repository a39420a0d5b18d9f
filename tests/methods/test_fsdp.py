"""Lightning's Trainer on one, two and four gloo ranks, FSDP2 beside DDP: losses and checkpoints equal in fp32.

With two batches accumulated, clipped gradients, weight decay, WiSE, and validation whose last batches are uneven.
Processes are forked, so that none imports anything anew.
"""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from ports import free_port
from small import METHODS, batch, build
from torch.utils.data import DataLoader, IterableDataset

from clipfix.methods.base import Method
from clipfix.models.clip import Backbone
from clipfix.training.callbacks import Finite
from clipfix.training.checkpoints import SameBuckets, WholeFiles, load_repair
from clipfix.training.sharding import shard, unsharded
from clipfix.training.strategy import FSDP2
from clipfix.training.weight_averaging import WiSE

ROWS, STEPS, ACCUMULATED = 8, 3, 2
UNEVEN = ((4, 4, 3), (4, 1), (2,), (4, 4, 4, 3))  # rows of the validation batches of each rank
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in METHODS},
    "diva, lora": ("diva", {"groups": ["trainable=lora"], "trainable": {"rank": 4, "alpha": 4}, "caption_weight": 1.0}),
    "longclip, chunked": ("longclip", {"chunk": 2}),
}
# Adam's own eps lets gradients of nothing but rounding move a weight as far as real ones.
OPTIMIZER = {"name": "AdamW", "lr": 1e-2, "eps": 1e-3, "weight_decay": 0.1}
FAST = ("longclip", "diva, lora")  # frozen rows, and adapters; the others differ by their loss, which test_ranks has
RESUMED = {  # after the first step, by another strategy or number of ranks than wrote it
    "ddp -> fsdp": ("ddp", "fsdp", 2),
    "fsdp -> ddp": ("fsdp", "ddp", 2),
    "fsdp -> four": ("fsdp", "fsdp", 4),
    "fsdp -> one": ("fsdp", "auto", 1),
}


Run = tuple[str, str, str, int, dict[str, Any]]  # into which folder, the case, the strategy, ranks, settings of `fit`


class Stream(IterableDataset):
    """Batch n of all ranks at step n, and of it this rank's rows; one batch may be spoiled on the last rank."""

    def __init__(self, method: Method, rank: int, ranks: int, spoiled: int | None) -> None:
        self.method, self.rank, self.ranks, self.spoiled = method, rank, ranks, spoiled

    def __iter__(self):
        for seed in range(self.method.batches_seen, 100):
            mine = part(batch(ROWS, seed), self.rank, self.ranks)
            if seed == self.spoiled and self.rank == self.ranks - 1:
                mine["image"][0, 0, 0, 0] = torch.nan
            yield mine


class Uneven(IterableDataset):
    def __init__(self, ranks: tuple[int, ...]) -> None:
        self.ranks = ranks

    def __iter__(self):
        for rank in self.ranks:
            for number, rows in enumerate(UNEVEN[rank]):
                yield batch(rows, 1000 + 10 * rank + number)


def part(inputs: dict[str, Any], rank: int, ranks: int) -> dict[str, Any]:
    def own(value: Any) -> Any:
        each = len(value) // ranks
        return value[rank * each : (rank + 1) * each]

    return {key: own(value) if isinstance(value, list | torch.Tensor) else value for key, value in inputs.items()}


class Alone(L.Callback):
    """The first rank looks at some pictures, as callbacks that draw do, and the others go on."""

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object) -> None:
        with unsharded(pl_module), torch.no_grad():
            if trainer.is_global_zero:
                assert pl_module.backbone.encode_image(batch(2)["image"]).isfinite().all()


def fit(
    case: str, clip: str, generator: str, folder: Path, kind: str, rank: int, ranks: int,
    resume: Path | None = None, seen_by: tuple[int, ...] | None = None, spoiled: int | None = None,
) -> None:  # fmt: skip
    """Leaves step=1.ckpt and so on, and the metrics of the last step."""
    name, own = SETTINGS[case]
    settings = {"steps": STEPS, "optimizer": OPTIMIZER} | own
    method = build(name, clip, generator, *settings.pop("groups", ()), **settings)
    each = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    trainer = L.Trainer(
        accelerator="cpu", devices=ranks, strategy=FSDP2() if kind == "fsdp" else kind,
        max_steps=STEPS, max_epochs=-1, accumulate_grad_batches=ACCUMULATED, gradient_clip_val=0.1,
        val_check_interval=2 * ACCUMULATED, check_val_every_n_epoch=None, num_sanity_val_steps=0, logger=False,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False, plugins=[WholeFiles()],
        callbacks=[each, Finite(str(folder), patience=2), WiSE(0.5), Alone(), SameBuckets()],
    )  # fmt: skip
    data = Stream(method, rank, ranks, spoiled), Uneven(seen_by or (rank,))
    trainer.fit(method, *(DataLoader(each, batch_size=None) for each in data), ckpt_path=resume, weights_only=True)
    if kind == "fsdp":
        check_parts(method, ranks)
    if rank == 0 or ranks == 1:
        torch.save(trainer.callback_metrics, folder / "metrics.pt")


def check_parts(method: Method, ranks: int) -> None:
    """Of trained weights a rank holds its part, of others all."""
    trained = [weight for weight in method.parameters() if weight.requires_grad]
    held = sum(weight.to_local().numel() for weight in trained)
    assert held < (1 / ranks + 0.1) * sum(weight.numel() for weight in trained)
    assert all(type(weight) is torch.nn.Parameter for weight in method.parameters() if not weight.requires_grad)


def planned(folder: Path, slow: bool) -> tuple[list[Run], list[Run]]:
    """Runs of one rank, and of two and four."""
    cases = [case for case in SETTINGS if (case not in FAST) == slow]
    alone: list[Run] = [(f"{case}-one", case, "auto", 1, {"seen_by": (0, 1)}) for case in cases]
    runs: list[Run] = [(f"{case}-{kind}", case, kind, 2, {}) for case in cases for kind in ("ddp", "fsdp")]
    for name, (writer, reader, ranks) in RESUMED.items():
        if ranks > 1 and (name != "ddp -> fsdp") == slow:
            written = folder / f"longclip-{writer}" / "step=1.ckpt"
            runs.append((name, "longclip", reader, ranks, {"resume": written}))
    if not slow:
        return alone, [*runs, ("spoiled", "finetune", "fsdp", 2, {"spoiled": 3})]
    alone.append(("four-one", "finetune", "auto", 1, {"seen_by": (0, 1, 2, 3)}))
    runs.append(("four", "finetune", "ddp", 4, {}))
    runs.append(("four, resumed", "finetune", "ddp", 4, {"resume": folder / "four" / "step=1.ckpt"}))
    return alone, runs


def worker(rank: int, port: int, clip: str, generator: str, folder: Path, slow: bool) -> None:
    torch.set_num_threads(1)
    alone, runs = planned(folder, slow)
    if rank == 3:  # has the least to do
        for into, case, kind, ranks, settings in alone:
            fit(case, clip, generator, folder / into, kind, 0, ranks, **settings)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "LOCAL_RANK": str(rank), "NODE_RANK": "0"}
    for number, (into, case, kind, ranks, settings) in enumerate(runs):
        if rank < ranks:
            os.environ["MASTER_PORT"] = str(port + number)
            fit(case, clip, generator, folder / into, kind, rank, ranks, **settings)
            dist.destroy_process_group()


@pytest.fixture(scope="module")
def fast(clip_folder, generator_folder, tmp_path_factory) -> Path:
    """The folders of runs of several ranks, and of one rank beside each."""
    folder = tmp_path_factory.mktemp("fsdp")
    arguments = (free_port(row=50), clip_folder, generator_folder, folder, False)
    mp.start_processes(worker, arguments, nprocs=4, start_method="fork")
    return folder


@pytest.fixture(scope="module")
def all_runs(fast, clip_folder, generator_folder) -> Path:
    arguments = (free_port(row=50), clip_folder, generator_folder, fast, True)
    mp.start_processes(worker, arguments, nprocs=4, start_method="fork")
    return fast


@pytest.fixture
def together(request) -> Path:
    return request.getfixturevalue("all_runs" if request.node.get_closest_marker("slow") else "fast")


def slow_but_for(*fast: str, of: Iterable[str]) -> list[Any]:
    return [pytest.param(name, marks=[pytest.mark.slow] * (name not in fast)) for name in of]


def saved(folder: Path, step: int = STEPS) -> dict[str, Any]:
    checkpoint = torch.load(folder / f"step={step}.ckpt", weights_only=True)
    assert checkpoint["global_step"] == step
    return {name: checkpoint[name] for name in ("state_dict", "training", "optimizer_states", "lr_schedulers")}


def assert_same(found: Any, expected: Any, where: str = "checkpoint") -> None:
    """The same entries of the same types; tensors to 1e-4 of how far a weight moves in one step."""
    assert type(found) is type(expected), where
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key in expected:
            assert_same(found[key], expected[key], f"{where}.{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for number, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_same(one, other, f"{where}.{number}")
    elif isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype, where
        atol = 1e-4 * OPTIMIZER["lr"]
        torch.testing.assert_close(found, expected, rtol=0, atol=atol, msg=lambda m: f"{where}: {m}")


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("case", slow_but_for(*FAST, of=SETTINGS))
def test_two_ranks_write_the_checkpoint_of_one(case, kind, together):
    """Moments, which are sums of gradients, included."""
    assert_same(saved(together / f"{case}-{kind}"), saved(together / f"{case}-one"))
    one, two = (torch.load(together / f"{case}-{run}" / "metrics.pt") for run in ("one", kind))
    assert two["train/loss"].item() == pytest.approx(one["train/loss"].item(), rel=1e-4)


@pytest.mark.parametrize("name", slow_but_for("ddp -> fsdp", "fsdp -> one", of=RESUMED))
def test_resumed_by_another_strategy_or_number_of_ranks(name, together, clip_folder, generator_folder):
    writer, reader, ranks = RESUMED[name]
    if ranks == 1:
        written = together / f"longclip-{writer}" / "step=1.ckpt"
        fit("longclip", clip_folder, generator_folder, together / name, reader, 0, 1, resume=written, seen_by=(0, 1))
    assert_same(saved(together / name), saved(together / "longclip-one"))


@pytest.mark.slow
def test_four_ranks_resume_to_the_same_bits(together):
    torch.testing.assert_close(saved(together / "four, resumed"), saved(together / "four"), rtol=0, atol=0)


def test_frozen_rows_keep_their_bits(together, clip_folder, generator_folder):
    name, rows = "backbone.model.text.positional_embedding", slice(6)
    before = build("longclip", clip_folder, generator_folder).get_parameter(name)
    after = saved(together / "longclip-fsdp")["training"][name]
    assert torch.equal(after[rows], before[rows])
    assert not torch.equal(after[rows.stop :], before[rows.stop :])


def test_another_command_reads_a_sharded_runs_checkpoint(together, clip_folder):
    backbone = Backbone(clip_folder, "random")
    load_repair(backbone, str(together / "diva, lora-fsdp" / f"step={STEPS}.ckpt"))
    for name, weight in saved(together / "diva, lora-one")["state_dict"].items():
        if name.startswith("backbone."):
            torch.testing.assert_close(backbone.get_parameter(name.removeprefix("backbone.")), weight)


def test_a_step_that_one_rank_spoils_is_passed_over_by_all(together):
    first, second, third = (saved(together / "spoiled", step)["training"] for step in (1, 2, 3))
    assert all(torch.equal(second[name], weight) for name, weight in first.items())
    assert all(weight.isfinite().all() and not torch.equal(weight, second[name]) for name, weight in third.items())


@pytest.mark.parametrize(
    "run",
    slow_but_for(
        "longclip-ddp", "longclip-fsdp", of=["longclip-ddp", "longclip-fsdp", "finetune-fsdp", "fff-fsdp", "four"]
    ),
)
def test_validation_scores_each_batch_whatever_rank_has_it(run, together):
    """Ranks with three batches and with two, the last ones short: the mean over images that one rank gives who has all.

    Only of methods without draws, which depend on the number of a batch on its rank.
    """
    one, ranks = (
        torch.load(together / name / "metrics.pt")["val/loss"].item() for name in (f"{run.partition('-')[0]}-one", run)
    )
    assert ranks == pytest.approx(one, rel=1e-5)


def test_what_cannot_be_sharded_is_refused(clip_folder, generator_folder):
    with pytest.raises(ValueError, match=r"method\.compiled=false.*trainer=ddp"):
        shard(build("denoise", clip_folder, generator_folder, compiled=True), None)


@pytest.mark.parametrize(
    ("precision", "verb", "refusal"),
    [("32-true", "predict", "nothing trains here: choose"), ("bf16-true", "fit", "choose 32-true or bf16-mixed")],
)
def test_a_trainer_that_cannot_shard_says_so(precision, verb, refusal):
    trainer = L.Trainer(accelerator="cpu", devices=1, strategy=FSDP2(), precision=precision, logger=False)
    trainer.state.fn = {"fit": TrainerFn.FITTING, "predict": TrainerFn.PREDICTING}[verb]
    with pytest.raises(ValueError, match=refusal):
        trainer.strategy.setup(trainer)
