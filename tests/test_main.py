"""The front door: the real command, on the real configs, with small data."""

import csv
import json
import os
import re
import subprocess
import sys
import zipfile
from contextlib import redirect_stdout
from functools import cache
from io import StringIO
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from shards import photographs
from test_launch import on_two_ranks
from wandb_runs import stored

from clipfix.__main__ import main
from clipfix.results.workspace import GROUPED_BY, workspace

ROOT = Path(__file__).parents[1]
METHODS = sorted(path.stem for path in (ROOT / "conf" / "method").glob("*.yaml"))
# Two steps on CPU, everything logged; drawn worlds of a few dozen pictures.
RUN = [
    "logger=csv",
    "trainer=cpu",
    "trainer.val_check_interval=1",
    "trainer.log_every_n_steps=1",
    "method.warmup_steps=1",
]
DATA = ["data.batch_size=8", "data.workers=0", "data.shuffle=0"]
SIZES = {
    "train": 64,
    "selection": 48,
    "test": 48,
    "pairs_train": 1,
    "pairs_selection": 2,
    "pairs_test": 2,
    "summaries_test": 3,
    "train_junk": 0.08,  # one world for every method, whatever its recipe asks for
    "train_wrong": 0.05,
    "popular": 0,
    "processes": 1,
}
WORLD = [f"data.prepare.{name}={size}" for name, size in SIZES.items()]
QUICK = [*RUN, *DATA, *WORLD, "method.steps=2"]
DIVA = ["method=diva", "method.projection_steps=1", "method.watch_every=1"]  # one step of each stage, all notes taken
FEWER = [f"~eval.benchmarks.{name}" for name in ("pairs_local", "probes", "retrieval_long", "lengths")]  # dear to score
UNSTAGED = ["method.projection_from=images", "method.projection_steps=0"]  # its tower moves from the first step on
UNDRAWN = ["callbacks.reconstructions=null"]


@pytest.fixture(scope="session")
def scenes(tmp_path_factory) -> str:
    return f"data.prepare.root={tmp_path_factory.mktemp('world') / 'scenes'}"


def refusal(clipfix, *arguments: str) -> str:
    with pytest.raises(SystemExit) as exit_:
        clipfix(*arguments)
    assert isinstance(exit_.value.code, str)
    assert "Traceback" not in exit_.value.code
    return exit_.value.code


def python_m_clipfix(*arguments: str, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "clipfix", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


@pytest.fixture(scope="session")
def fitted(scenes, tmp_path_factory):
    """A small fit of a method, made once, with W&B offline: its run folder and what it printed."""

    @cache
    def fit(method: str) -> tuple[Path, str]:
        arguments = [*(DIVA if method == "diva" else [f"method={method}"]), scenes, *QUICK, "logger=wandb"]
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
    for picture in ("scores", "curves", "pairs", "retrieval_short"):
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
    for picture in ("scores", "scores_all", "curves", "pairs", "retrieval_short", "retrieval_long", "lengths"):
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


def test_diva_learns_the_same_from_stored_latents(clipfix, scenes):
    """Stored in half; the selection split has none, and its own are computed."""
    settings = [scenes, *QUICK, "eval=none", "diffusion.dtype=fp32"]
    clipfix("run=annotate", "annotator=latents", "annotator.output=stored", *settings)
    read = ["data.train=stored", "data.latents=latent.npz"]
    losses = []
    for extra in ([], read):
        folder, _ = clipfix("method=diva", *UNSTAGED, *extra, *settings)
        with (folder / "metrics.csv").open() as file:
            rows = list(csv.DictReader(file))
        losses.append({name: [float(row[name]) for row in rows if row[name]] for name in ("train/loss", "val/loss")})
    assert len(losses[0]["train/loss"]) == 2
    assert losses[0]["val/loss"]
    for name, expected in losses[0].items():
        assert losses[1][name] == pytest.approx(expected, rel=1e-3)
    message = refusal(clipfix, "method=diva", *UNSTAGED, *read, *settings, "diffusion.dtype=bf16")
    assert "stored/train-00000.tar has latents of PatchPCA" in message
    assert "write them by run=annotate annotator=latents" in message
    assert "reads no stored latents" in refusal(clipfix, "method=finetune", *read, *settings)


@pytest.mark.parametrize(
    "settings",
    [
        ["method=finetune", "method.optimizer.lr=0.01"],
        ["method=finetune", "method.optimizer.lr=0.01", "wise=0.5"],
        ["method=diva", *UNSTAGED, *UNDRAWN, "method.optimizer.lr=0.1", "method.train=lora", "wise=0.5"],
    ],
    ids=["finetune", "wise", "lora and wise"],
)
def test_eval_of_a_checkpoint_repeats_the_scores_after_fit(settings, clipfix, scenes):
    fit, _ = clipfix(*settings, scenes, *QUICK, *FEWER)
    after, before = (json.loads((fit / "results.json").read_text())["scores"][when] for when in ("after", "before"))
    assert after != before
    best = fit / "checkpoints" / "best.ckpt"
    again, _ = clipfix("run=eval", f"checkpoint={best}", "method=finetune", scenes, *QUICK, *FEWER)
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
    assert re.search(r"eval\.benchmarks\.zeroshot .* in data\.train too", message)


def test_same_seed_same_scores_and_sweeps_differ_by_seed(clipfix, scenes, tmp_path):
    sweep = ["-m", "seed=1,2,1", *DIVA, "method.optimizer.lr=0.01", "eval.selection=null"]
    sweep += UNDRAWN
    clipfix(*sweep, scenes, *QUICK, *FEWER, "logger=wandb")
    one, two, three = (
        json.loads(path.read_text())["scores"]["after"]
        for path in sorted(tmp_path.glob("outputs/sweeps/*/*/results.json"), key=os.path.getmtime)
    )
    assert one == three != two
    assert len(list(tmp_path.glob("outputs/sweeps/*/*/wandb/offline-run-*"))) == 3


@pytest.mark.parametrize(
    ("picture", "choices"),
    [
        ("retrieval", ["method=finetune", "eval=standard"]),
        ("lengths", ["method=longclip", "eval=long", "++data.texts.long={key: caption, pick: one, k: 1}"]),
    ],
)
def test_photographs_packed_by_img2dataset(picture, choices, clipfix, tmp_path, monkeypatch):
    """The main job on real pictures in a folder as img2dataset leaves it, scored by retrieval; W&B knows nobody."""
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    for split in ("train", "selection", "test"):
        photographs(tmp_path / split)
    run, _ = clipfix(
        *RUN, *DATA, "logger=wandb", "data=shards", *choices,
        "data.train=train", "data.selection=selection", "eval.shards=test",
        "data.batch_size=2", "method.steps=2",
    )  # fmt: skip
    scores = json.loads((run / "results.json").read_text())["scores"]
    assert {value for name, value in scores["after"].items() if name.endswith("image_to_text_R@10")} == {100.0}
    assert (run / f"{picture}.png").exists()
    assert list(run.glob(f"wandb/offline-run-*/files/media/images/report/{picture}*.png"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["seeed=1"], ["no seeed", "Did you mean seed?", "backbone"]),
        (["method.step=1"], ["no method.step", "method.steps"]),
        (["method=divaa"], ["method/divaa", "diva", "finetune"]),
        (["run=train"], ["run=train", "fit, eval"]),
        (["backbone=vit-l14"], ["data.train, eval.shards"]),
        (["backbone=vit-b32", "data.train=nowhere/*.tar", "eval=none"], ["backbone.pretrained=/path/to/file"]),
        (["backbone.pretrained=nowhere.pt"], ["nowhere.pt"]),
        (["method=longclip", "data=shards", "data.train=nowhere", "eval=none"], ["reads data.texts.long", "key: long"]),
        (["method=finetune", "method.train=[vision]"], ["visual, text, logit_scale"]),
        (["method=fff", "method.reference=null"], ["method.reference is null", "data.features=features.npz"]),
        (["method=finetune", "data=shards", "data.train=nowhere/*.tar", "eval=none"], ["nowhere"]),
        (["run=eval", "backbone=folder", "eval=none"], ["backbone.name=..."]),
    ],
)
def test_mistakes_get_one_clear_error(arguments, words, clipfix, capsys):
    message = refusal(clipfix, *arguments)
    assert "Error executing job" not in capsys.readouterr().err  # hydra's way
    assert all(word in message for word in words), message
    assert not list(Path.cwd().glob("outputs/*/*")), "a run that never started left a folder"


@pytest.mark.parametrize(
    ("method", "error", "words"),
    [
        ("finetune", torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), ["2.00 GiB"]),
        ("longclip", RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: ..."), ["method.chunk=64"]),
        ("fff", RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed."), ["lower method.tile (256)"]),
        ("diva", MemoryError(), ["method.checkpointing=true", "diffusion.checkpointing=true"]),
    ],
)
def test_out_of_memory_says_what_to_lower(method, error, words, clipfix, scenes, monkeypatch):
    def full(*_, **__):
        raise error

    monkeypatch.setattr("lightning.Trainer.fit", full)
    message = refusal(clipfix, *(DIVA if method == "diva" else [f"method={method}"]), scenes, *QUICK, "eval=none")
    assert all(word in message for word in ["Out of memory (", "lower data.batch_size (8)", *words]), message
    assert "diffusion" not in message or method == "diva"


def test_a_run_that_diverges_stops_and_leaves_its_batch(clipfix, scenes):
    settings = ["eval=none", "method.steps=9", "method.optimizer.lr=1e30", "callbacks.finite.patience=2"]
    message = refusal(clipfix, "method=finetune", scenes, *RUN, *DATA, *WORLD, *settings)
    assert "NaN or infinite in 2 steps in a row" in message
    assert "Lower method.optimizer.lr" in message
    (kept,) = Path.cwd().glob("outputs/*/*/nonfinite-0.pt")
    batch = torch.load(kept, weights_only=True)
    assert len(batch["key"]) == len(batch["image"]) == 8


@pytest.mark.parametrize("backbone", sorted(path.stem for path in (ROOT / "conf" / "backbone").glob("*.yaml")))
@pytest.mark.parametrize("method", METHODS)
def test_every_pair_of_method_and_backbone_composes(method, backbone, clipfix):
    _, printed = clipfix(f"method={method}", f"backbone={backbone}", "--cfg", "job")
    config = yaml.safe_load(printed)
    generator = "tiny/diffusion" if backbone == "tiny" else "stable-diffusion-2-1-base"
    assert generator in config["diffusion"]["path"]
    assert config["data"]["train"] == ("???" if backbone != "tiny" else config["data"]["train"])


@pytest.mark.parametrize("size", ["b32", "b16"])
def test_the_papers_fff_trains_from_nothing_and_mines_by_another_model(size, clipfix):
    arguments = [f"experiment=fff-vit-{size}", "data.train=x", "eval.shards=y", "--cfg", "job"]
    config = yaml.safe_load(clipfix(*arguments)[1])
    assert config["backbone"]["pretrained"] == "random"
    assert size[1:] in config["backbone"]["name"]
    assert (config["method"]["reference"]["name"], config["method"]["reference"]["pretrained"]) == (
        "ViT-B-16-quickgelu",
        "openai",
    )
    assert config["data"]["texts"]["captions"] == {"key": "captions", "pick": "all", "k": 5}
    assert config["method"]["thresholds"]["image_image"] == 0.92


def test_recipes_of_the_drawn_world_stay_in_it(clipfix):
    """The tiny CLIP on its own world has its own numbers; other shards and named experiments do not see them."""
    drawn = yaml.safe_load(clipfix("method=finetune", "--cfg", "job")[1])
    assert (drawn["method"]["train"], drawn["data"]["shuffle"]) == (["visual"], 0)
    for arguments in (["method=finetune", "data=shards"], ["experiment=pretrain_tiny_clip_words"]):
        other = yaml.safe_load(clipfix(*arguments, "--cfg", "job")[1])
        assert other["method"]["train"] == ["visual", "text", "logit_scale"]
        assert other["data"]["texts"]["caption"]["key"] == "txt"


@pytest.mark.parametrize("group", ["data", "trainer", "logger", "eval", "diffusion", "experiment"])
def test_every_choice_of_every_group_composes(group, clipfix):
    for path in sorted((ROOT / "conf" / group).glob("*.yaml")):
        _, printed = clipfix(f"{group}={path.stem}", "--cfg", "job")
        assert yaml.safe_load(printed)["seed"] == 0


def test_help_is_quick_and_lists_the_groups():
    """About two seconds, which is without what takes longer to import; a clock would tell how busy the machine is."""
    command = [sys.executable, "-X", "importtime", "-m", "clipfix", "--help"]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    imported = {line.rpartition("|")[2].strip() for line in found.stderr.splitlines()}
    assert "hydra" in imported
    assert not imported & {
        "torch",
        "lightning",
        "open_clip",
        "transformers",
        "diffusers",
        "wandb",
        "matplotlib",
        "numpy",
    }
    assert all(
        re.search(rf"^{group}: ", found.stdout, re.MULTILINE) for group in ("method", "backbone", "data", "eval")
    )


def test_wheel_runs_from_any_folder(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        cwd=ROOT, check=True, capture_output=True,
    )  # fmt: skip
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        wheel.extractall(site)
    assert (site / "clipfix" / "tiny" / "clip" / "open_clip_model.safetensors").exists()
    shown = python_m_clipfix(
        "--cfg", "job", "-p", "backbone", "--resolve", cwd=elsewhere, env={**os.environ, "PYTHONPATH": str(site)}
    )
    assert str(site / "clipfix" / "tiny" / "clip") in shown.stdout, shown.stderr


def as_started(*words: str) -> None:
    sys.argv = ["clipfix", *words]
    with Path(f"printed-{os.environ['RANK']}").open("w") as printed, redirect_stdout(printed):
        main()


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
