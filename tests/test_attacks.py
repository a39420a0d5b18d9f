"""Files from outside that carry code, commands or markup. Each attack would create a file; none may."""

import io
import json
import pickle
from pathlib import Path

import layouts
import numpy as np
import pytest
import torch
import yaml
from front_door import refusal
from omegaconf import OmegaConf
from PIL import Image
from runs import SETTINGS, run
from torch import Tensor, nn

from clipfix.cli import errors, resolvers
from clipfix.cli.stored import stored_config
from clipfix.data.sets.named import Named
from clipfix.data.shards import expand, read_shard
from clipfix.evals import plots
from clipfix.evals.embed import load_rgb
from clipfix.evals.plots import gallery
from clipfix.models import convert
from clipfix.models.clip import Backbone
from clipfix.models.pretrained import load_tokenizer
from clipfix.results.compare.examples import changed
from clipfix.results.compare.results import group, read
from clipfix.system import secrets
from clipfix.system.terminal import visible


class RunsWhenLoaded(nn.Module):
    """A TorchScript module whose program writes a file while it is loaded: `from_file` creates what it maps."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path, self.weight, self.training = path, nn.Parameter(torch.ones(2)), False

    def forward(self, x: Tensor) -> Tensor:
        return x

    @torch.jit.export
    def __getstate__(self) -> tuple[Tensor, bool, str]:
        return self.weight, self.training, self.path

    @torch.jit.export
    def __setstate__(self, state: tuple[Tensor, bool, str]) -> None:
        mapped = torch.from_file(state[2], shared=True, size=4)
        self.weight, self.training, self.path = state[0] + mapped.sum(), state[1], state[2]


def test_the_program_of_a_torchscript_archive_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.jit.script(RunsWhenLoaded(str(tmp_path / "ran"))).save(file := tmp_path / "evil.pt")
    with monkeypatch.context() as patched:
        patched.setattr(torch.jit, "load", None)
        with pytest.raises(ValueError, match=r"evil\.pt is a TorchScript archive .*not run") as error:
            convert.read(file)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()
    torch.jit.load(file)
    assert (tmp_path / "ran").exists(), "the archive is harmless, so nothing was tested"


def test_the_tensors_of_a_torchscript_archive_are_those_of_torch(tmp_path: Path) -> None:
    layers = nn.Sequential(nn.Linear(3, 4).half(), nn.BatchNorm1d(4), nn.Linear(4, 4))
    layers[2].weight.data = torch.randn(4, 4).T  # a view with other strides
    torch.jit.script(layers).save(file := tmp_path / "weights.pt")
    expected = torch.jit.load(file).state_dict()
    state = convert.read(file)
    assert state.keys() == expected.keys()
    for name, weight in expected.items():
        assert state[name].dtype == weight.dtype
        assert torch.equal(state[name], weight)
    whole = file.read_bytes()
    for damaged in (whole[:-200], whole.replace(b"_rebuild_tensor_v2", b"_rebuild_tensor_v9")):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"weights\.pt"):
            convert.read(file)


# -- result files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shards", "place"),
    [
        ("pipe:touch ran", "commands"),
        (["pipe:touch ran"], "commands"),
        ("{pipe:touch ran,pipe:touch ran2}", "commands"),
        ("http://127.0.0.1:9/test.tar", "urls"),
        ("memory://bucket/test.tar", "urls"),
    ],
)
def test_what_a_result_file_names_is_opened_only_if_this_run_says_so(shards, place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def opened(url: str, *_: object) -> None:
        (tmp_path / "ran").touch()
        raise OSError("opened")

    monkeypatch.setattr("clipfix.data.shards.open_shard", opened)
    asked = {"shards": shards, "text": {"key": "long", "pick": "one"}, "recall_at": [1, 5], "allow_pipe": True}
    groups = group([read(run(tmp_path / "run", benchmarks=SETTINGS | {"retrieval_long": asked}))])
    cases, (line,) = changed(groups, 4)
    assert cases == []
    assert f"compare.examples_from={place}" in line
    assert "\n" not in line
    assert not (tmp_path / "ran").exists()
    changed(groups, 4, "commands")
    assert (tmp_path / "ran").exists(), "the file is harmless, so nothing was tested"


def test_a_command_of_a_result_file_does_not_run_at_the_front_door(clipfix):
    asked = {
        "shards": "pipe:touch ran",
        "text": {"key": "long", "pick": "one"},
        "recall_at": [1, 5],
        "allow_pipe": True,
    }
    run(Path("run"), benchmarks=SETTINGS | {"retrieval_long": asked})
    words = ["run=compare", "run", "logger=csv", "compare.resamples=50"]
    _, printed = clipfix(*words)
    assert "No examples" in printed
    assert not Path("ran").exists()
    assert "'files', 'urls' or 'commands'" in refusal(clipfix, *words, "compare.examples_from=anything")
    clipfix(*words, "compare.examples_from=commands")
    assert Path("ran").exists(), "the file is harmless, so nothing was tested"


@pytest.mark.parametrize("name", ["flickr30k", "tfds/x", "imagenetv2", "wds"])
def test_only_readers_that_run_nothing_read_a_set(name, tmp_path):
    """Other builders of clip_benchmark pass the folder's name to a shell."""
    with pytest.raises(ValueError, match=r"choose from cifar10, cifar100, objectnet, wds/<name>"):
        Named(root=str(tmp_path), fetch="", samples=None, name=name, present="test")


def test_the_name_of_a_folder_is_no_command(tmp_path, monkeypatch):
    """clip_benchmark downloads ObjectNet by commands with the name of the folder, if it does not exist."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("clip_benchmark.datasets.builder.call", lambda *_, **__: Path("ran").touch())
    named = Named(root="x; touch ran", fetch="", samples=None, name="objectnet", present=str(tmp_path))
    with pytest.raises(ValueError, match="is not a folder"):
        list(named)
    assert not Path("ran").exists()


# -- published sets ----------------------------------------------------------------------------------------------------


class Touch:
    """An object whose unpickling creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("suffix", ["pkl", "pickle", "pyd", "pth", "npy", "npz"])
def test_a_published_set_is_not_unpickled(suffix, tmp_path):
    layouts.vtab(tmp_path)
    code = pickle.dumps(Touch(tmp_path / "ran"))
    if suffix == "npy":  # numpy's own format around a pickle
        np.save(buffer := io.BytesIO(), np.array([Touch(tmp_path / "ran")], dtype=object), allow_pickle=True)
        code = buffer.getvalue()
    picture = layouts.encoded(Image.new("RGB", (8, 8)))
    label = {} if suffix == "npy" else {"cls": "3"}
    layouts.pack(tmp_path / "wds_vtab-pets" / "test" / "0.tar", {"s0": {"png": picture, suffix: code, **label}})
    (tmp_path / "wds_vtab-pets" / "test" / "nshards.txt").write_text("1\n")
    pets = Named(str(tmp_path / "wds_vtab-pets"), "Fetch it.", None, name="wds/pets", present="test")
    if label:
        (sample,) = pets
        assert sample["json"] == {"label": 3}
    else:
        with pytest.raises(ValueError, match=r"s0 in .*0\.tar is broken"):
            list(pets)
    assert not (tmp_path / "ran").exists()


def test_postscript_in_a_published_set_is_not_opened(tmp_path):
    """Pillow would start Ghostscript for it."""
    (tmp_path / "a.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n")
    with pytest.raises(ValueError, match=r"a\.jpg cannot be read"):
        load_rgb(tmp_path / "a.jpg")


def test_a_file_named_like_a_command_is_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    layouts.pack(tmp_path / "pipe:touch ran; echo .tar", {"s0": {"txt": b"a cat"}})
    for source in (".", "*.tar"):
        (shard,) = expand(source)
        assert [sample["txt"] for sample in read_shard(shard)] == [b"a cat"]
    assert not (tmp_path / "ran").exists()


# -- checkpoints -------------------------------------------------------------------------------------------------------

TINY = Path(convert.__file__).parents[1] / "tiny" / "clip"
HONEST = {
    "seed": 0,
    "wise": None,
    "data": {"train": "train.tar"},
    "method": {"_target_": "clipfix.methods.finetune.Finetune", "steps": 1},
    "backbone": {"_target_": "clipfix.models.clip.Backbone", "name": str(TINY), "pretrained": None},
}
TOUCH = {"_target_": "os.system", "command": "touch ran", "_args_": ["touch ran"]}
ATTACKS = {
    "a callable as the backbone": ({"backbone": TOUCH}, "os.system"),
    "a callable as the method": ({"method": TOUCH}, "os.system"),
    "deep in the method": ({"method": HONEST["method"] | {"parts": [{"deep": TOUCH}]}}, "os.system"),
    "deep in the backbone": ({"backbone": HONEST["backbone"] | {"pretrained": TOUCH}}, "os.system"),
    "a library behind a module of ours": (
        {"backbone": {"_target_": "clipfix.results.provenance.subprocess.run", "args": ["touch", "ran"]}},
        "subprocess.run",
    ),
    "a function of ours": ({"backbone": {"_target_": "clipfix.models.convert.read", "path": "x"}}, "convert.read"),
    "a class that another defines": ({"backbone": {"_target_": "clipfix.models.convert.Path"}}, "convert.Path"),
    "a class of ours that is no backbone": (
        {"backbone": {"_target_": "clipfix.models.diffusion.Diffusion"}},
        "is no Backbone",
    ),
    "by a getter of hydra": (
        {"backbone": {"_target_": "hydra.utils.get_method", "path": "os.system"}},
        "hydra.utils.get_method",
    ),
    "by the getter that this run's benchmarks use": (
        {"backbone": {"_target_": "hydra.utils.get_object", "path": "os.system"}},
        "hydra.utils.get_object",
    ),
    "an environment variable": (
        {"backbone": HONEST["backbone"] | {"name": "${oc.env:HOME}"}},
        "interpolation ${oc.env:HOME}",
    ),
    "a list": ([1, 2], "not a config"),
    "no method": ({"method": None}, "no group method"),
    "a number as a name": ({"backbone": HONEST["backbone"] | {"name": 5}}, "backbone.name is 5"),
}


def checkpoint(config: str) -> str:
    state = {f"backbone.{name}": w for name, w in Backbone(str(TINY)).state_dict().items() if name.endswith("proj")}
    torch.save({"state_dict": state, "config_yaml": config, "batches_seen": 1, "global_step": 1}, "it.ckpt")
    return "checkpoint=it.ckpt"


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_config_in_a_checkpoint_builds_a_model_and_nothing_else(attack, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    change, told = ATTACKS[attack]
    config = OmegaConf.create(HONEST | change if isinstance(change, dict) else change)
    with pytest.raises(ValueError, match=r"^it\.ckpt: its stored config is refused: ") as error:
        stored_config({"config_yaml": OmegaConf.to_yaml(config)}, "it.ckpt", OmegaConf.create(HONEST))
    assert told in str(error.value)
    assert "\n" not in str(error.value)
    assert not Path("ran").exists()


def test_a_callable_in_a_checkpoint_is_refused_at_the_front_door(clipfix):
    words = checkpoint(OmegaConf.to_yaml(OmegaConf.create(HONEST | {"backbone": TOUCH, "method": TOUCH})))
    for verb in (["run=export", "to=open_clip", "output=out"], ["run=eval", "eval=none", "trainer=cpu", "logger=csv"]):
        message = refusal(clipfix, *verb, words)
        assert "it.ckpt: its stored config is refused: method names os.system" in message
        assert message.count("\n") == 1  # before the hint on HYDRA_FULL_ERROR
    assert not Path("ran").exists()
    assert not Path("out").exists()


def test_a_method_of_ones_own_is_known_if_this_run_names_it():
    toy = HONEST["method"] | {"_target_": "toys.pairs.Pairs"}
    saved = {"config_yaml": OmegaConf.to_yaml(OmegaConf.create(HONEST | {"method": toy}))}
    with pytest.raises(ValueError, match=r"choose it on the command line: method="):
        stored_config(saved, "it.ckpt", OmegaConf.create(HONEST))
    assert stored_config(saved, "it.ckpt", OmegaConf.create(HONEST | {"method": toy})).method == toy


def test_a_tag_of_python_in_a_stored_config_is_refused(clipfix):
    message = refusal(clipfix, "run=export", checkpoint("!!python/object/apply:os.system ['touch ran']"), "output=out")
    assert "it is not a config" in message
    assert not Path("ran").exists()


def test_an_honest_config_in_a_checkpoint_builds_its_model(clipfix):
    clipfix("run=export", checkpoint(OmegaConf.to_yaml(OmegaConf.create(HONEST))), "to=open_clip", "output=out")
    assert Path("out/open_clip/README.md").is_file()


def test_a_run_folder_from_outside_is_not_resolved(tmp_path, monkeypatch):
    """resume=auto reads the configs of earlier runs."""
    monkeypatch.setenv("SEED_OF_OTHERS", "0")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "config.yaml").write_text(
        yaml.safe_dump(HONEST | {"seed": "${oc.decode:${oc.env:SEED_OF_OTHERS}}"})
    )
    assert resolvers.newest_same_run(tmp_path, HONEST) is None
    (tmp_path / "a" / "config.yaml").write_text(yaml.safe_dump(HONEST))
    assert resolvers.newest_same_run(tmp_path, HONEST) == tmp_path / "a"


# -- text in places that read markup -----------------------------------------------------------------------------------

HOSTILE = "[/bold]<script>alert(1)</script>\x1b]0;title\x07 $\\frac{1$ \u202egnp"


def test_names_in_a_result_file_are_text_on_the_screen_in_the_page_and_in_figures(clipfix):
    for seed, folder in enumerate(("one", "two")):
        path = run(Path(folder), seed=seed, method=HOSTILE, control=HOSTILE, versions={HOSTILE: HOSTILE})
        path.write_text(path.read_text().replace("eval/zeroshot/shape", f"eval/zeroshot/{json.dumps(HOSTILE)[1:-1]}"))
        (Path(folder) / "outcomes.npz").unlink()
    _, printed = clipfix("run=compare", "one", "two", "logger=csv", "compare.resamples=50")
    (page,) = Path().glob("outputs/compare/*/report.html")
    assert "[/bold]<script>" in printed
    assert "<script>" not in page.read_text()
    assert "&lt;script&gt;" in page.read_text()
    for text in (printed, page.read_text(), (page.parent / "scores.txt").read_text()):
        assert not {"\x1b", "\x07", "\u202e"} & set(text)
        assert "\\x1b]0;title" in text
    assert (page.parent / "forgetting.png").is_file()  # the legend has the names


def test_captions_are_no_formulas():
    image = Image.new("RGB", (8, 8))
    gallery([plots.Cell(image, HOSTILE, [(HOSTILE, None)])], across=1).savefig(io.BytesIO())


def test_control_characters_do_not_reach_the_log_or_an_error(monkeypatch):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    record = secrets.Record("x", 20, "x.py", 1, "%s is broken", (HOSTILE,), None)
    assert not {"\x1b", "\x07", "\u202e"} & set(record.getMessage())
    with pytest.raises(SystemExit) as exit_, errors.in_one_line():
        raise ValueError(HOSTILE)
    assert not {"\x1b", "\x07", "\u202e"} & set(str(exit_.value.code))
    assert visible("tab\tand\nline, ä 漢字") == "tab\tand\nline, ä 漢字"


# -- folders of transformers -------------------------------------------------------------------------------------------


def code_in(folder: Path, **described: object) -> Path:
    """Write a folder whose code creates a file when it is imported."""
    folder.mkdir()
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\nclass Evil: pass\n")
    auto = {"AutoConfig": "evil.Evil", "AutoTokenizer": ["evil.Evil", None], "AutoModel": "evil.Evil"}
    (folder / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": auto} | described))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Evil", "auto_map": auto}))
    return folder


def test_code_in_a_folder_of_transformers_is_not_run(tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    folder = code_in(tmp_path / "evil")
    with pytest.raises(ValueError, match=r"backbone\.name=.*no code of a folder is run") as error:
        Backbone(str(folder))
    assert "\n" not in str(error.value)
    for options in ({}, {"trust_remote_code": True}):
        with pytest.raises(ValueError, match=r"No code of a folder is run") as error:
            load_tokenizer("evil", folder, {"hf_tokenizer_name": "x", "tokenizer_kwargs": options}, 77)
        assert "\n" not in str(error.value)
    assert not (folder / "ran").exists()
