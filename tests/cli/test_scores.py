"""Scores of the real command: what they are of, that they repeat, and that ranks agree on them."""

import json
import os
import re
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest
from front_door import DIVA, FEW, FEWER, QUICK, UNDRAWN, UNSTAGED, WORLD, python_m_clipfix, refusal
from two_ranks import on_two_ranks

from clipfix.__main__ import main


@pytest.mark.parametrize(
    "settings",
    [
        ["method=finetune", "method.optimizer.lr=0.01"],
        pytest.param(["method=finetune", "method.optimizer.lr=0.01", "wise=0.5"], marks=pytest.mark.slow),
        ["method=diva", *UNSTAGED, *UNDRAWN, "method.optimizer.lr=0.1", "trainable@method.trainable=lora", "wise=0.5"],
    ],
    ids=["finetune", "wise", "lora and wise"],
)
def test_eval_of_a_checkpoint_repeats_the_scores_after_fit(settings, clipfix, scenes):
    fit, _ = clipfix(*settings, scenes, *QUICK, *FEW)
    after, before = (json.loads((fit / "results.json").read_text())["scores"][when] for when in ("after", "before"))
    assert after != before
    best = fit / "checkpoints" / "best.ckpt"
    again, _ = clipfix("run=eval", f"checkpoint={best}", "method=finetune", scenes, *QUICK, *FEW)
    results = json.loads((again / "results.json").read_text())
    assert results["scores"]["score"] == after
    trained = json.loads((fit / "results.json").read_text())
    assert trained["weights"]["after"] != trained["weights"]["before"]
    assert results["weights"]["score"] == trained["weights"]["after"]
    assert [results[fact] for fact in ("method", "wise", "data")] == [
        trained[fact] for fact in ("method", "wise", "data")
    ]


def test_nothing_is_scored_that_chose_the_checkpoint(clipfix, scenes):
    settings = ["method=finetune", scenes, *QUICK]
    message = refusal(clipfix, *settings, "eval.selection.pairs.shards=${eval.benchmarks.pairs.shards}")
    assert re.search(
        r"eval\.benchmarks\.pairs would be scored on \S*pairs-test-00000\.tar, .* eval\.selection", message
    )
    message = refusal(clipfix, *settings, "data.train=${eval.benchmarks.zeroshot.shards}")
    assert re.search(r"eval\.benchmarks\.zeroshot .* data\.train", message)


def test_same_seed_same_scores_and_sweeps_differ_by_seed(clipfix, scenes, tmp_path):
    sweep = ["-m", "seed=1,2,1", *DIVA, "method.optimizer.lr=0.01", "eval.selection=null"]
    sweep += UNDRAWN
    clipfix(*sweep, scenes, *QUICK, *FEW, "logger=wandb")
    one, two, three = (
        json.loads(path.read_text())["scores"]["after"]
        for path in sorted(tmp_path.glob("outputs/sweeps/*/*/results.json"), key=os.path.getmtime)
    )
    assert one == three != two
    assert len(list(tmp_path.glob("outputs/sweeps/*/*/wandb/offline-run-*"))) == 3


def as_started(*words: str) -> None:
    sys.argv = ["clipfix", *words]
    with Path(f"printed-{os.environ['RANK']}").open("w") as printed, redirect_stdout(printed):
        main()


def test_two_ranks_score_as_one(clipfix, scenes, tmp_path):
    """The 48 pictures fill no whole batch, and the second rank prints nothing."""
    words = ["run=eval", scenes, *QUICK, *FEW]
    folder, _ = clipfix(*words)
    two = [*words, "trainer.devices=2", "trainer.strategy=auto", "hydra.run.dir=two"]
    assert on_two_ranks("torchrun", as_started, *two) == [0, 0]
    alone, shared = (json.loads((run / "results.json").read_text())["scores"] for run in (folder, tmp_path / "two"))
    assert shared == alone
    assert ["Run folder" in (tmp_path / f"printed-{rank}").read_text() for rank in (0, 1)] == [True, False]


@pytest.mark.slow
def test_two_devices_score_as_one(clipfix, scenes, tmp_path):
    """Before and after training, started by Lightning, and alone, by torchrun; pictures that fill no whole batch."""
    two = [scenes, *QUICK, *FEWER, "trainer.devices=2", "trainer.strategy=auto"]
    trained = python_m_clipfix("method=finetune", *two, "hydra.run.dir=fit", cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    fit = json.loads((tmp_path / "fit" / "results.json").read_text())["scores"]
    assert fit["before"] != fit["after"]
    for column, checkpoint in ("before", []), ("after", ["checkpoint=fit/checkpoints/best.ckpt"]):
        folder, _ = clipfix("run=eval", "trainer=cpu", scenes, *WORLD, *FEWER, *checkpoint)
        assert json.loads((folder / "results.json").read_text())["scores"]["score"] == fit[column]
    assert on_two_ranks("torchrun", as_started, "run=eval", *two, *checkpoint, "hydra.run.dir=eval") == [0, 0]
    assert json.loads((tmp_path / "eval" / "results.json").read_text())["scores"]["score"] == fit["after"]
    assert ["Run folder" in (tmp_path / f"printed-{rank}").read_text() for rank in (0, 1)] == [True, False]
