"""The front door to the published benchmarks: python -m clipfix run=eval eval=published."""

import json
import os
import subprocess
import sys
from pathlib import Path

import layouts
import pytest
import torch
from omegaconf import OmegaConf
from planted import Planted

from clipfix import CONF
from clipfix.__main__ import main

NAMES = ("mmvp", "urban1k", "coco", "imagenet", "sugarcrepe", "winoground")  # the others are not there
PICTURES = 48
TRUTH: layouts.Truth = {}


def perfect(name: str, **_: object) -> Planted:
    """What yaml asks for instead of a CLIP: each text lies where the pictures do that TRUTH says it is true of."""
    eye = torch.eye(PICTURES)
    model = Planted(eye, {text: eye[numbers].sum(0) if numbers else eye[-1] for text, numbers in TRUTH.items()})
    model.name, model.folder, model.model = name, None, model.layer
    return model


def swap(one: str, other: str) -> None:
    TRUTH[one], TRUTH[other] = TRUTH[other], TRUTH[one]


@pytest.fixture
def root(tmp_path) -> Path:
    """Six sets in miniature, and a model that takes two texts of four of them for each other."""
    TRUTH.clear()
    for name in NAMES:
        TRUTH.update(getattr(layouts, name)(tmp_path / "sets"))
    swap("a photo of thing 0, seen", "a photo of thing 1, seen")
    swap("street 2", "street 7")
    swap("the 3 above the other", "the other above the 3")
    swap("add_obj 1 is so", "add_obj 1 is not so")
    return tmp_path / "sets"


@pytest.fixture
def clipfix(tmp_path, monkeypatch):
    """Runs the command in an empty folder, with the planted model."""
    monkeypatch.chdir(tmp_path)

    def command(*words: str) -> None:
        arguments = ["clipfix", "run=eval", f"backbone._target_={perfect.__module__}.perfect", *words]
        monkeypatch.setattr(sys, "argv", arguments)
        monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)  # `main` sets it
        main()

    return command


def test_what_is_there_is_scored_and_told_apart_by_its_files(root, tmp_path, clipfix, capsys):
    asked = [benchmark for name in NAMES for benchmark in OmegaConf.load(CONF / "eval" / f"{name}.yaml").benchmarks]
    miniature = [f"eval.benchmarks.{name}.shards.samples=null" for name in asked if name != "mmvp_local"]
    clipfix("eval=published", f"eval.root={root}", *miniature)

    (path,) = tmp_path.glob("outputs/*/*/results.json")
    results = json.loads(path.read_text())
    scores = {name.removeprefix("eval/"): score for name, score in results["scores"]["score"].items()}
    assert {name.split("/")[0] for name in scores} == set(asked)
    wrong = {
        "mmvp/mean": 75,
        "mmvp/viewpoint_and_perspective": 50,
        "mmvp/ties": 0,
        "urban1k/image_to_text_R@1": 100 * 10 / 12,
        "urban1k/text_to_image_R@1": 100 * 10 / 12,
        "sugarcrepe/add_obj": 200 / 3,
        "sugarcrepe/mean": (6 * 100 + 200 / 3) / 7,
        "sugarcrepe/ties": 0,
        **{f"winoground/{name}": 75 for name in ("text", "image", "group")} | {"winoground/ties": 0},
    }
    assert {name: scores[name] for name in wrong} == pytest.approx(wrong)
    right = [name for name in scores if name.split("/")[0] not in ("mmvp", "mmvp_local", "urban1k")]
    assert {scores[name] for name in right if name not in wrong} == {100}

    assert set(results["data"]) == set(asked)
    assert {len(told["sha256"]) for told in results["data"].values()} == {64}
    hashes = {name: told["sha256"] for name, told in results["data"].items()}
    assert hashes.pop("mmvp_local") == hashes["mmvp"]
    assert results["data"]["urban1k"]["files"] == 24
    assert results["data"]["coco_val2017"]["sha256"] != results["data"]["coco_karpathy"]["sha256"]

    printed = capsys.readouterr().out.splitlines()
    skipped = [line for line in printed if line.startswith("Skipped ")]
    assert all("there is no " in line and str(root) in line for line in skipped)
    published = OmegaConf.load(CONF / "eval" / "published.yaml").defaults[:-1]
    all_of_them = [name for group in published for name in OmegaConf.load(CONF / "eval" / f"{group}.yaml").benchmarks]
    assert [line.split()[1].rstrip(":") for line in skipped] == [name for name in all_of_them if name not in asked]
    assert not (tmp_path / "data").exists()  # the tiny CLIP brings the drawn world, and nobody asked for it


def test_the_drawn_world_is_made_where_a_benchmark_reads_it(root, clipfix, monkeypatch):
    def drawn(world):
        raise ValueError(f"{world.root} is asked for")

    monkeypatch.setattr("clipfix.data.scenes.World.__call__", drawn)
    with pytest.raises(SystemExit, match="data/scenes is asked for"):
        clipfix("eval=scenes")


def test_missing_data_is_named_before_torch_is_imported(tmp_path):
    """The answer takes a second then, and not the ten and more of a first start."""
    code = f"""if True:
        import sys
        from clipfix.__main__ import main
        sys.argv = ["clipfix", "run=eval", "eval=published", "eval.root={tmp_path}"]
        try:
            main()
        except SystemExit as told:
            print(told.code, "torch" in sys.modules)"""
    quiet = {name: value for name, value in os.environ.items() if name != "HYDRA_FULL_ERROR"}  # `main` sets it
    command = [sys.executable, "-c", code]
    asked = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path, env=quiet)
    assert f"mmvp: there is no {tmp_path}/MMVP_VLM/Questions.csv. Fetch MMVP/MMVP_VLM" in asked.stdout
    assert asked.stdout.rstrip().endswith("False")
