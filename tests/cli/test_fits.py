"""The real command on the real configs: a fit of each method, and all that its run folder, W&B and workspace hold."""

import csv
import json
import re
import sys
from contextlib import redirect_stdout
from functools import cache
from io import StringIO
from pathlib import Path

import pytest
import yaml
from front_door import DIVA, FEWER, METHODS, QUICK, ROOT
from PIL import Image
from wandb_runs import stored

from clipfix.__main__ import main
from clipfix.results.workspace import GROUPED_BY, workspace

SCORED_WHOLE = ("diva", "finetune")  # with pictures; the other methods by what is quickly scored, and without
PICTURES = ("scores", "curves", "pairs", "retrieval_short", "retrieval_long", "lengths")


@pytest.fixture(scope="session")
def fitted(scenes, tmp_path_factory):
    """A small fit of a method, made once, with W&B offline: its run folder and what it printed."""

    @cache
    def fit(method: str) -> tuple[Path, str]:
        arguments = [*(DIVA if method == "diva" else [f"method={method}"]), scenes, *QUICK, "logger=wandb"]
        arguments += ["report.pictures=true"] if method in SCORED_WHOLE else FEWER
        arguments.append("+trainer.limit_val_batches=1")  # of six; scores are of the whole split
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()) as printed:
            patch.chdir(tmp_path_factory.mktemp(method))
            patch.setattr(sys, "argv", ["clipfix", *arguments])
            patch.delenv("HYDRA_FULL_ERROR", raising=False)
            main()
            (results,) = Path.cwd().glob("outputs/*/*/results.json")
        return results.parent, printed.getvalue()

    return fit


@pytest.mark.parametrize("method", METHODS)
def test_fit_leaves_a_complete_run_folder(method, fitted):
    folder, printed = fitted(method)
    results = json.loads((folder / "results.json").read_text())
    assert results["scores"]["before"].keys() == results["scores"]["after"].keys()
    assert (results["model"], results["backbone"], results["method"]) == ("tiny/clip", "tiny", method)
    assert {benchmark.split("/")[1] for benchmark in results["scores"]["after"]} == results["data"].keys()
    assert results["precision"] == {"scores": "fp32", "training": "32-true"}
    assert "before" in printed
    assert "change" in printed
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["method"]["steps"] == 2
    with (folder / "metrics.csv").open() as file:
        columns = set(csv.DictReader(file).fieldnames or ())
    assert {"train/loss", "perf/images_per_second", "data/skipped"} <= columns
    assert ("lengths" in results["data"]) == (method in SCORED_WHOLE)
    for picture in PICTURES if method in SCORED_WHOLE else ():
        with Image.open(folder / f"{picture}.png") as image:
            assert min(image.size) > 200
    assert {path.name for path in (folder / "checkpoints").iterdir()} >= {"last.ckpt", "best.ckpt"}


@pytest.mark.parametrize("method", METHODS)
def test_wandb_stores_what_the_run_folder_has(method, fitted):
    """Read back from the file that an offline run leaves, which `wandb sync` sends."""
    folder, _ = fitted(method)
    run = stored(folder)
    results = json.loads((folder / "results.json").read_text())
    with (folder / "metrics.csv").open() as file:
        logged = list(csv.DictReader(file))
    for name in ("train/loss", "selection/pairs/mean", "perf/images_per_second", "optimizer/lr/pg1"):
        expected = {int(row["step"]): float(row[name]) for row in logged if row.get(name)}
        assert len(expected) >= 2
        assert run.scalars(name) == pytest.approx(expected), name
    for name, before in results["scores"]["before"].items():
        after = results["scores"]["after"][name]
        assert run.scalars(name) == pytest.approx({0: before, results["step"]: after}), name
        assert run.summary[name] == pytest.approx(after)

    (table,) = run.media("report/before_after")
    content = json.loads(table.read_text())
    assert content["columns"] == ["score", "before", "after"]
    scores = results["scores"]
    rows = [[name.removeprefix("eval/"), *(column[name] for column in scores.values())] for name in scores["before"]]
    assert content["data"] == rows
    for picture in PICTURES if method in SCORED_WHOLE else ():
        (sent,) = run.media(f"report/{picture}")
        with Image.open(sent) as one, Image.open(folder / f"{picture}.png") as other:
            assert one.tobytes() == other.tobytes()

    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert {name: run.config[name] for name in config} == config
    assert [run.at(key) for key in GROUPED_BY] == [method, "tiny"]
    assert run.group == f"{method}-tiny"
    sweep = yaml.safe_load((ROOT / "sweeps" / f"{method}.yaml").read_text())
    assert run.scalars(sweep["metric"]["name"])


def test_the_workspace_shows_what_runs_log_and_nothing_else(fitted, clipfix):
    evaluation = yaml.safe_load(clipfix("--cfg", "job", "-p", "eval")[1])
    view = workspace("me", "clipfix", evaluation["benchmarks"], evaluation["selection"], evaluation["selection_metric"])
    sections = view._spec["spec"]["section"]["panelBankConfig"]["sections"]
    names = {name for method in METHODS for name in stored(fitted(method)[0]).names()}
    assert "train/loss" in names
    shown: set[str] = set()
    for section in sections:
        for panel in section["panels"]:
            found = shows(panel["config"], names)
            assert {name.split("/")[0] for name in found - {"val/loss"}} <= {section["name"]}
            # A generator's samples are drawn by an experiment, pictures of several runs by run=compare.
            assert found or section["name"] in ("samples", "compare"), panel
            shown |= found
    assert shown == names


def shows(panel: dict, names: set[str]) -> set[str]:
    """Those of the names that a panel of a workspace asks for."""
    asked = {*panel.get("metrics", ()), *panel.get("mediaKeys", ())}
    regex, table = panel.get("metricRegex", "^$"), json.dumps(panel.get("panel2Config"))
    return {name for name in names if name in asked or re.search(regex, name) or f'"{name}"' in table}
