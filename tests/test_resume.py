"""Bad days: a run that is killed, stopped or out of space goes on to the very weights of one that was left alone."""

import csv
import multiprocessing
import os
import resource
import signal
import sys
from pathlib import Path

import pytest
import torch
import yaml
from small_runs import STEPS, command, send, weights

from clipfix.cli import resolvers
from clipfix.training.checkpoints import WholeFiles, checkpoint_to_resume


@pytest.fixture(scope="module")
def whole(tmp_path_factory, world) -> dict[str, torch.Tensor]:
    """What a run learns that nothing happens to."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", [])
        command(world, "hydra.run.dir=run")
    return weights(folder / "run")


def killed(*words: str) -> int:
    """The signal that ended the same command in a process of its own, which begins where this one stands."""
    process = multiprocessing.get_context("fork").Process(target=command, args=words)
    process.start()
    process.join()
    return -(process.exitcode or 0)


def cut_off_while_saving(checkpoint: object, file: object) -> None:
    file.write(b"half of it")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("hook", "batch"),
    [("on_train_batch_start", 4), ("on_before_optimizer_step", 5), ("on_validation_start", 2), ("on_fit_start", 1)],
)
def test_a_killed_run_goes_on_to_the_same_weights(hook, batch, world, whole, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [])
    assert killed(world, send(signal.SIGKILL, hook, batch)) == signal.SIGKILL
    command(world, "resume=auto")
    (run,) = (tmp_path / "outputs").glob("*/*")
    assert all(torch.equal(value, whole[key]) for key, value in weights(run).items())


def test_another_seed_or_rate_is_another_run(world, tmp_path, monkeypatch, capsys):
    """Neither is gone on with, even where it is the newest; nor is one that began within the same second."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [])
    for words in ["seed=1"], [], ["method.optimizer.lr=0.5"]:
        command(world, "method.steps=1", "resume=auto", *words)
    said = capsys.readouterr().out
    assert said.count("resume=.../checkpoints/last.ckpt") == 2
    first, second, third = sorted((tmp_path / "outputs").glob("*/*"))
    for words, folder in ([], second), (["method.optimizer.lr=0.5"], third), (["seed=1"], first):
        command(world, "method.steps=1", "resume=auto", "trainer.log_every_n_steps=1", *words)
        assert f"Resuming {folder}" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["a: 1", "- a", "method: 3\ndata: {train: a}\nbackbone: b", "a: [", ""])
def test_a_config_of_another_kind_is_passed_over(text, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(text)
    assert resolvers.newest_same_run(tmp_path, {"seed": 0}) is None
    method = {"_target_": "clipfix.methods.finetune.Finetune"}
    data = {"train": "a", "batch_size": 8, "texts": {}, "prepare": None}
    own = {"seed": 0, "wise": None, "method": method, "data": data, "backbone": None}
    assert resolvers.newest_same_run(tmp_path, own) is None
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(own))
    assert resolvers.newest_same_run(tmp_path, own) == tmp_path / "run"


def test_runs_of_one_second_have_folders_of_their_own(tmp_path):
    assert len({resolvers.new_folder(tmp_path / "outputs") for _ in range(5)}) == 5


def test_killed_while_it_saves(world, whole, tmp_path, monkeypatch, capsys):
    """The checkpoint before is still there, and what was half written is swept up."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [])
    assert killed(world, send(signal.SIGKILL, "on_train_batch_start", 4)) == signal.SIGKILL
    (run,) = (tmp_path / "outputs").glob("*/*")
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", cut_off_while_saving)
        assert killed(world, "resume=auto") == signal.SIGKILL
    assert len(list(run.glob("checkpoints/.last.ckpt.*.part"))) == 1
    command(world, "resume=auto")
    assert f"Resuming {run}/checkpoints/last.ckpt" in capsys.readouterr().out
    assert not list(run.glob("checkpoints/.*"))
    assert all(torch.equal(value, whole[key]) for key, value in weights(run).items())


def validated(run: Path) -> list[int]:
    """Return the steps after which a run was validated, before it was stopped and after it was resumed."""
    rows = csv.DictReader((run / "metrics.csv").open())
    return [int(row["step"]) + 1 for row in rows if row["val/loss"]]


@pytest.mark.parametrize(
    ("number", "accumulate", "batch", "step"),
    [
        (signal.SIGTERM, 1, 3, 3),
        (signal.SIGUSR1, 2, 5, 3),  # the only one that shows where an accumulated step ends
        pytest.param(signal.SIGTERM, 1, 4, 4, marks=pytest.mark.slow),
    ],
)
def test_asked_to_end_it_saves_and_goes_on(
    number, accumulate, batch, step, world, whole, tmp_path, monkeypatch, capsys
):
    """Between two steps; an accumulated one is done with first."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [])
    settings = [world, f"trainer.accumulate_grad_batches={accumulate}"]
    if accumulate == 1:
        expected = whole
    else:
        command(*settings, "hydra.run.dir=whole")
        expected = weights(tmp_path / "whole")
    with pytest.raises(SystemExit) as stopped:
        command(*settings, send(number, "on_train_batch_start", batch))
    assert stopped.value.code == 128 + signal.SIGTERM
    assert f"saved after step {step}. Set resume=auto" in capsys.readouterr().out
    (run,) = (tmp_path / "outputs").glob("*/*")
    saved = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == step
    command(*settings, "resume=auto")
    assert validated(run) == [2 // accumulate * (n + 1) for n in range(STEPS * accumulate // 2)]  # each of them once
    assert f" {STEPS * accumulate}/{STEPS * accumulate} " in capsys.readouterr().out  # of the progress bar
    assert all(torch.equal(value, expected[key]) for key, value in weights(run).items())


def test_a_full_disk_keeps_the_last_good_checkpoint(tmp_path):
    files, path = WholeFiles(), tmp_path / "checkpoints" / "last.ckpt"
    files.save_checkpoint({"step": 1}, path)
    room = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, room[1]))
    try:
        with pytest.raises(ValueError, match=r"last\.ckpt cannot be written .*make room") as error:
            files.save_checkpoint({"step": 2, "weights": torch.zeros(100_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, room)
    assert len(str(error.value).splitlines()) == 1
    assert torch.load(path, weights_only=True) == {"step": 1}
    assert [each.name for each in path.parent.iterdir()] == ["last.ckpt"]


def test_what_is_cut_off_is_named_and_passed_over(tmp_path, capsys):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for name in ("last", "best"):
        torch.save({"state_dict": {"backbone.x": torch.zeros(1000)}, "batches_seen": 2}, folder / f"{name}.ckpt")
    assert checkpoint_to_resume("auto", tmp_path) == str(folder / "last.ckpt")
    whole = (folder / "last.ckpt").read_bytes()
    (folder / "last.ckpt").write_bytes(whole[: len(whole) // 2])
    capsys.readouterr()
    assert checkpoint_to_resume("auto", tmp_path) == str(folder / "best.ckpt")
    assert f"{folder / 'last.ckpt'} is damaged" in capsys.readouterr().out
    (folder / "best.ckpt").write_bytes(b"")
    assert checkpoint_to_resume("auto", tmp_path) is None
    assert checkpoint_to_resume(None, tmp_path) is None
    with pytest.raises(ValueError, match="resume=7 does not exist"):
        checkpoint_to_resume(7, tmp_path)
