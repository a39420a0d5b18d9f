"""The sweeps of W&B: what `wandb sweep` sends of them, and what `wandb agent` then runs."""

from pathlib import Path

import pytest
import wandb
import yaml
from click.testing import CliRunner
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from wandb.cli.cli import cli
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args, load_sweep_config
from wandb_api import server

from clipfix import CONF

SWEEPS = Path(__file__).parents[1] / "sweeps"
METHODS = sorted(path.stem for path in SWEEPS.glob("*.yaml"))


def test_each_is_of_a_method():
    """A method may have none."""
    assert {path.stem for path in SWEEPS.iterdir()} <= {path.stem for path in (CONF / "method").glob("*.yaml")}


@pytest.mark.parametrize("method", METHODS)
def test_all_that_a_sweep_tries_composes(method):
    """Every end of a range and every value, the others at theirs; and what the recipe has is among what is tried."""
    sweep = load_sweep_config(str(SWEEPS / f"{method}.yaml"))
    assert sweep is not None
    known = composed(sweep, {})
    assert known.method._target_.split(".")[-2] == method
    ends = {name: given.get("values") or [given["min"], given["max"]] for name, given in sweep["parameters"].items()}
    for name, tried in ends.items():
        value = OmegaConf.select(known, name)
        value = 1.0 if name == "wise" and value is None else value
        assert value in tried or ("min" in sweep["parameters"][name] and tried[0] < value < tried[1]), name
    for turn in range(max(map(len, ends.values()))):
        told = {name: tried[turn % len(tried)] for name, tried in ends.items()}
        config = composed(sweep, told)
        assert {name: OmegaConf.select(config, name) for name in told} == told


@pytest.mark.parametrize("method", METHODS)
def test_the_selection_split_judges(method):
    """By what also chooses the checkpoint; a generator, whose checkpoint is its last, by its loss on that split."""
    sweep = yaml.safe_load((SWEEPS / f"{method}.yaml").read_text())
    config = composed(sweep, {})
    if method == "denoise":
        assert sweep["metric"] == {"name": f"val/t{config.method.check_timesteps[2]}_right", "goal": "minimize"}
    else:
        assert sweep["metric"] == {"name": f"selection/{config.eval.selection_metric}", "goal": "maximize"}
    watched = [config.data.selection, *(benchmark.shards for benchmark in (config.eval.selection or {}).values())]
    assert {Path(shards).name for shards in watched} <= {"selection-*.tar", "pairs-selection-*.tar"}


def test_wandb_takes_them(monkeypatch, tmp_path):
    """The command itself, as far as the wire; the server's own validation was not seen."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    wandb.teardown()  # it keeps the settings of its first use
    with server() as (address, sent):
        monkeypatch.setenv("WANDB_BASE_URL", address)
        for method in METHODS:
            done = CliRunner().invoke(cli, ["sweep", "-p", "clipfix", str(SWEEPS / f"{method}.yaml")])
            assert done.exit_code == 0, done.output
        wandb.teardown()
    assert len(sent) == len(METHODS)
    for method, variables in zip(METHODS, sent, strict=True):
        assert yaml.safe_load(variables["config"]) == yaml.safe_load((SWEEPS / f"{method}.yaml").read_text())


def composed(sweep: dict, told: dict):
    """The config of the run that an agent starts for these values."""
    arguments = create_sweep_command_args({"args": {name: {"value": value} for name, value in told.items()}})
    arguments |= {"env": ["/usr/bin/env"], "interpreter": ["python"], "program": [sweep["program"]]}
    words = []
    for word in create_sweep_command(list(sweep["command"])):
        macro = word.startswith("${") and word.endswith("}")  # as wandb_agent.py decides it
        words += arguments[word[2:-1]] if macro else [word]
    assert words[:4] == ["/usr/bin/env", "python", "-m", "clipfix"]
    assert "logger=wandb" in words
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", overrides=words[4:])
