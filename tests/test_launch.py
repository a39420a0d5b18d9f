"""Many ranks, many jobs: torchrun and SLURM as they set the environment, sweeps by hydra's launchers and Optuna."""

import csv
import multiprocessing
import os
import signal
import sys
import time
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import optuna
import pytest
import torch
import yaml
from omegaconf import OmegaConf
from small_runs import RUN, STEPS, Signal, weights
from two_ranks import on_two_ranks, started
from wandb_runs import stored

from clipfix.__main__ import main
from clipfix.cli import sweeps
from clipfix.system import ranks

SWEEPS = Path(__file__).parents[1] / "sweeps"
DDP = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.precision=32-true"]
PAIRS = """
benchmarks:
  pairs: {_target_: clipfix.evals.pairs.Pairs, shards: "${data.prepare.root}/pairs-test-*.tar", prefix: "a photo of "}
selection:
  pairs: {_target_: clipfix.evals.pairs.Pairs, shards: "${data.prepare.root}/pairs-selection-*.tar", prefix: a}
selection_metric: pairs/mean
"""


def says() -> tuple[str, int, int | str]:
    """From rank 1 some time after rank 0 has said its own and might be gone."""
    rank, meeting = ranks.environment().global_rank(), ranks.meeting
    ranks.meeting = lambda *where: (meeting(*where), time.sleep(rank))[0]
    return ranks.agreed(lambda: f"told by {rank}"), ranks.nodes(), ranks.devices()


@pytest.mark.parametrize("kind", ["torchrun", "srun"])
def test_ranks_agree(kind):
    told = multiprocessing.get_context("fork").Queue()
    assert on_two_ranks(kind, says, results=told) == [0, 0]
    assert sorted(told.get() for _ in range(2)) == [(rank, ("told by 0", 1, 2)) for rank in (0, 1)]


def test_alone_there_is_nobody_to_agree_with(monkeypatch):
    assert (ranks.agreed(lambda: "mine"), ranks.nodes(), ranks.devices()) == ("mine", 1, "auto")
    for name, value in started("torchrun", 5, 0, ranks=8).items():
        monkeypatch.setenv(name, value)
    assert (ranks.nodes(), ranks.devices()) == (4, 2)


class SignalOne(Signal):
    """To rank 1 alone: as where one host of many is taken away."""

    def strike(self, trainer, *_: object) -> None:
        if trainer.global_rank == 1:
            super().strike()


@pytest.fixture
def pairs(tmp_path) -> list[str]:
    """Words by which pairs alone are scored, on either split."""
    (tmp_path / "conf" / "eval").mkdir(parents=True)
    (tmp_path / "conf" / "eval" / "pairs.yaml").write_text(PAIRS)
    return ["-m", f"--config-dir={tmp_path / 'conf'}", "eval=pairs"]


def command(*words: str) -> None:
    options = [word for word in words if word.startswith("-")]  # argparse wants these first
    sys.argv = ["clipfix", *options, *RUN, *(word for word in words if word not in options)]
    os.environ.pop("HYDRA_FULL_ERROR", None)
    main()


def test_a_signal_to_one_rank_stops_all_and_they_go_on_to_the_same_weights(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = [world, *DDP]
    assert on_two_ranks("srun", command, *settings, "hydra.run.dir=whole") == [0, 0]
    hit = "{_target_: test_launch.SignalOne, number: 15, hook: on_train_batch_start, batch: 3}"
    stopped = on_two_ranks("srun", command, *settings, f"+callbacks.signal={hit}")
    assert stopped == [128 + signal.SIGTERM] * 2
    (run,) = (tmp_path / "outputs").glob("*/*")
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 3 < STEPS
    assert on_two_ranks("srun", command, *settings, "resume=auto") == [0, 0]
    assert len(list((tmp_path / "outputs").glob("*/*"))) == 1
    expected = weights(tmp_path / "whole")
    assert all(torch.equal(value, expected[key]) for key, value in weights(run).items())


@pytest.mark.slow
def test_parallel_jobs_leave_a_folder_each_and_one_table(world, pairs, tmp_path, monkeypatch, capfd):
    """One of three jobs fails: it is named, and what the others found is kept."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(ranks.__file__).parents[1]))
    with pytest.raises(SystemExit) as exit_:
        command(*pairs, world, "logger=wandb", "hydra/launcher=parallel", "method.schedule.warmup_steps=0,1,99")
    assert "job 2 of the sweep: method.schedule.warmup_steps is 99" in str(exit_.value.code)
    assert "Traceback" not in str(exit_.value.code)
    (sweep,) = (tmp_path / "outputs" / "sweeps").iterdir()
    assert sorted(path.parent.name for path in sweep.glob("*/results.json")) == ["0", "1"]
    assert (sweep / "report.html").is_file()
    printed = capfd.readouterr().out
    assert printed.count("warmup_steps=0") == printed.count("warmup_steps=1") > 0
    assert {stored(sweep / job).group for job in ("0", "1")} == {f"sweep-{sweep.name}"}


@pytest.mark.slow
def test_optuna_is_told_the_score_of_the_selection_split_and_goes_on_later(world, pairs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kept = ["hydra.sweeper.storage=sqlite:///trials.db", "hydra.sweeper.study_name=mine"]
    scores = []
    for seed in "01":
        drawn = ["hydra.sweeper.n_trials=2", f"hydra.sweeper.sampler.seed={seed}"]
        command(*pairs, world, "hydra/sweeper=tune", "method.steps=2", *drawn, *kept)
        newest = max((tmp_path / "outputs" / "sweeps").iterdir())
        for job in "01":
            with (newest / job / "metrics.csv").open() as file:
                looks = [row for row in csv.DictReader(file) if row["val/loss"]]  # before training is no checkpoint
            scores.append(max(float(row["selection/pairs/mean"]) for row in looks))
        best = yaml.safe_load((newest / "optimization_results.yaml").read_text())
        assert best["best_value"] == pytest.approx(max(scores))
    ranges = yaml.safe_load((SWEEPS / "finetune.yaml").read_text())["parameters"]
    assert best["best_params"].keys() == ranges.keys()
    assert len(set(scores)) > 1
    study = optuna.load_study(study_name="mine", storage="sqlite:///trials.db")
    assert [trial.value for trial in study.trials] == pytest.approx(scores)
    assert len({str(trial.params) for trial in study.trials}) == 4


@pytest.mark.parametrize("method", ["diva", "fff", "finetune", "longclip"])
def test_optuna_draws_from_the_ranges_of_wandb(method):
    told = yaml.safe_load((SWEEPS / f"{method}.yaml").read_text())
    config = OmegaConf.create({"hydra": {"runtime": {"choices": {"method": method}}}})
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    trial = study.ask()
    trial.set_user_attr("method.optimizer.lr", "1e-3")  # as the command line settles it
    sweeps.suggest(config, trial)
    assert trial.params.keys() >= told["parameters"].keys() - {"method.optimizer.lr"}
    assert "method.optimizer.lr" not in trial.params
    for name, drawn in trial.distributions.items():
        given = told["parameters"].get(name)
        if given is None:
            assert f"{name}={trial.params[name]}" in told["command"]
        elif "values" in given:
            assert list(drawn.choices) == given["values"]
        else:
            assert (drawn.low, drawn.high) == (given["min"], given["max"])
            assert ("Log" in type(drawn).__name__) == given["distribution"].startswith("log")
    assert ("eval.selection_metric" in trial.params) == (method == "longclip")


def test_each_worker_of_a_sweep_takes_another_gpu(tmp_path):
    held = [sweeps.claim_gpu.__wrapped__(str(tmp_path), "4,7") for _ in range(3)]
    assert [device for device, _ in held] == ["4", "7", "4"]
    held[1][1].close()  # its process ended
    assert sweeps.claim_gpu.__wrapped__(str(tmp_path), "4,7")[0] == "7"


@pytest.mark.parametrize(
    ("words", "environment", "said"),
    [
        (["-m", "seed=0,1"], started("torchrun", 0, 0), "start a sweep (-m) once"),
        (["-m", "seed=0", "trainer.devices=2", "trainer.strategy=ddp"], {}, "set trainer.devices=1"),
        (["trainer.num_nodes=2"], {}, "trainer.num_nodes is 2"),
        ([*DDP, "trainer.devices=3"], started("torchrun", 0, 0, 1), "leave both out"),
        ([], {"SLURM_NTASKS": "2"}, "--ntasks-per-node=2"),
        (["trainer=gpu"], {}, "gpu"),
    ],
)
def test_wrong_numbers_are_answered_in_one_line(words, environment, said, world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as exit_:
        command(world, *words)
    message = str(exit_.value.code)
    assert said in message
    assert "Traceback" not in message


@pytest.mark.parametrize("word", ["hydra/launcher=parallel", "hydra/launcher=submitit_slurm", "hydra/sweeper=tune"])
def test_a_launcher_that_is_not_installed_is_named(word, monkeypatch):
    def absent(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("clipfix.cli.sweeps.distribution", absent)
    with pytest.raises(SystemExit) as exit_:
        command("-m", "seed=0,1", word)
    assert f"{word} needs a package that is not installed: pip install 'clipfix[sweep]'" in str(exit_.value.code)
