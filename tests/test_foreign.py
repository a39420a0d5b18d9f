"""Configs in files from elsewhere choose no code: checkpoints with a hostile `config_yaml`."""

from pathlib import Path

import pytest
import torch
import yaml
from omegaconf import OmegaConf

from clipfix.results import identity
from clipfix.system.foreign import check_classes

METHOD = {"_target_": "clipfix.methods.finetune.Finetune", "steps": 1}
MARK = "import pathlib; pathlib.Path({path!r}).touch()"


def checkpoint(path: Path, method: dict | None = None, backbone: dict | None = None) -> Path:
    config = {
        "method": method or METHOD, "seed": 0, "data": {"train": "x"},
        "backbone": backbone or {"_target_": "clipfix.models.clip.Backbone", "name": "ViT-B-32", "pretrained": None},
    }  # fmt: skip
    torch.save({"state_dict": {}, "batches_seen": 1, "config_yaml": yaml.safe_dump(config)}, path)
    return path


def attacks(mark: Path) -> dict[str, dict]:
    code = MARK.format(path=str(mark))
    return {
        "a function": {"_target_": "builtins.exec", "_args_": [code]},
        "a program": {"_target_": "subprocess.check_call", "_args_": [["touch", str(mark)]]},
        "a part of a method": METHOD | {"schedule": {"_target_": "builtins.exec", "_args_": [code]}},
        "in a list": METHOD | {"extra": [{"_target_": "os.system", "command": f"touch {mark}"}]},
        "under an old name": {"_target_": "clipfix.sets.os.system", "command": f"touch {mark}"},
        "what clipfix imports": {"_target_": "clipfix.models.convert.torch.hub.load", "repo_or_dir": "x", "model": "y"},
        "a function of clipfix": {"_target_": "clipfix.models.convert.read", "path": "x"},
    }


@pytest.mark.parametrize("attack", attacks(Path("x")))
@pytest.mark.parametrize("run", ["eval", "export"])
def test_checkpoint_chooses_no_code(run, attack, clipfix, clip_folder, tmp_path):
    mark = tmp_path / "ran"
    method = attacks(mark)[attack]
    hostile = {"backbone": method} if run == "export" and "schedule" not in method else {"method": method}
    path = checkpoint(tmp_path / "hostile.ckpt", **hostile)
    words = ["eval=none", "logger=csv", "backbone=folder", f"backbone.name={clip_folder}", "backbone.pretrained=random"]
    if run == "export":
        words = ["to=open_clip"]
    with pytest.raises(SystemExit, match=r"hostile\.ckpt: its stored config names .* no class of clipfix") as error:
        clipfix(f"run={run}", f"checkpoint={path}", *words)
    assert len(str(error.value).strip().splitlines()) == 2  # the second says how to see a traceback
    assert not mark.exists()


@pytest.mark.parametrize("run", ["eval", "export"])
def test_checkpoint_reads_no_environment(run, clipfix, clip_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("PASSWORD", "secret")
    path = checkpoint(tmp_path / "hostile.ckpt", METHOD | {"path": "${oc.env:PASSWORD}"})
    words = ["eval=none", "logger=csv", "backbone=folder", f"backbone.name={clip_folder}", "backbone.pretrained=random"]
    with pytest.raises(SystemExit, match=r"hostile\.ckpt: .*method\.path.* plain values") as error:
        clipfix(f"run={run}", f"checkpoint={path}", *(words if run == "eval" else ["to=open_clip"]))
    assert "secret" not in str(error.value)


@pytest.mark.parametrize(
    "stored", ["- a list", "a: [", "!!python/object/apply:os.system ['true']", 7, "${oc.env:HOME}", "method: 1"]
)
def test_stored_config_that_is_none_is_refused(stored):
    with pytest.raises(ValueError, match=r"last\.ckpt: its stored config"):
        identity.stored(stored, "last.ckpt")


def test_own_methods_are_known_when_the_run_names_them():
    own = {"method": {"_target_": "toys.labelled.Cache"}}
    with pytest.raises(ValueError, match=r"method=<its name>"):
        check_classes(own, "last.ckpt")
    check_classes(own, "last.ckpt", own)


def test_configs_of_all_methods_are_known():
    """What our own runs store passes."""
    conf = Path(__file__).parents[1] / "conf"
    for group in ("method", "condition", "timesteps", "feedback", "anchor", "trainable", "schedule", "objective",
                  "patches", "thresholds", "backbone", "diffusion"):  # fmt: skip
        for path in (conf / group).glob("*.yaml"):
            check_classes(OmegaConf.to_container(OmegaConf.load(path)), path.name)
