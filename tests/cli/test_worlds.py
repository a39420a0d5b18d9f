"""Which data, benchmarks and generator a world, a backbone and an experiment choose together."""

import pytest
import yaml
from hydra import compose, initialize_config_dir

import clipfix.cli.resolvers  # noqa: F401  defaults lists use them
from clipfix import CONF

DRAWN = {"data": "scenes", "eval": "scenes", "diffusion": "tiny"}
NONE = {"data": "shards", "eval": "standard", "diffusion": "sd21-base"}
WORLDS = sorted(path.stem for path in (CONF / "world").glob("*.yaml"))
BACKBONES = sorted(path.stem for path in (CONF / "backbone").glob("*.yaml"))


def composed(*words: str):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", overrides=list(words), return_hydra_config=True)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], {"backbone": "tiny", "world": "drawn", "recipe": "diva-tiny-scenes"} | DRAWN),
        (["backbone=vit-l14"], {"world": "none"} | NONE),
        (["backbone=tiny", "world=none"], {"backbone": "tiny", "world": "none"} | NONE),
        (["world=none"], {"backbone": "tiny", "world": "none"} | NONE),
        (["backbone=vit-b32", "world=drawn"], {"backbone": "vit-b32", "world": "drawn"} | DRAWN),
        (["data=shards"], {"world": "drawn"} | DRAWN | {"data": "shards"}),  # the command line wins
        (["backbone=vit-b32", "world=drawn", "eval=none"], {"world": "drawn"} | DRAWN | {"eval": "none"}),
        (["experiment=diva-vit-l14"], {"world": "none", "backbone": "vit-l14", "data": "cc3m", "eval": "standard"}),
        (["experiment=diva-vit-l14", "world=drawn"], {"data": "cc3m", "diffusion": "sd21-base"}),  # so does its file
        (["experiment=pretrain_tiny_clip"], {"world": "drawn", "recipe": None} | DRAWN | {"eval": "none"}),
        (["experiment=pretrain_tiny_diffusion"], {"world": "drawn"} | DRAWN | {"eval": "none", "diffusion": "blank"}),
        # Another model beside the repaired one changes nothing about the world.
        (["method=fff", "+backbone@method.mining.reference=vit-l14"], {"world": "drawn", "backbone": "tiny"} | DRAWN),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_choices(words, expected):
    choices = composed(*words).hydra.runtime.choices
    assert {group: choices[group] for group in expected} == expected


@pytest.mark.parametrize("world", WORLDS)
def test_every_world_composes_with_every_backbone(world, clipfix):
    for backbone in BACKBONES:
        printed = yaml.safe_load(clipfix(f"world={world}", f"backbone={backbone}", "--cfg", "job")[1])
        assert ("scenes" in printed["data"]["train"] or "prepare.root" in printed["data"]["train"]) == (
            world == "drawn"
        )
        assert "compiled" not in printed, "keys of a backbone belong into its node"
        assert {"_target_", "name", "pretrained", "context_length", "compiled"} <= printed["backbone"].keys()


def test_jobs_of_a_sweep_differ_by_world(clipfix, capsys):
    """Each job refuses by the name of its data, which is all that this needs to see."""
    with pytest.raises(SystemExit):
        clipfix("-m", "world=none,drawn", "backbone=vit-b32", "run=prepare", "data.prepare=null", "data.train=x")
    first, second, *_ = [line for line in capsys.readouterr().err.splitlines() if "of the sweep" in line]
    assert "data=shards" in first
    assert "data=scenes" in second
