"""Every choice of every group of the configs composes."""

from typing import Any

import pytest
from front_door import METHODS, ROOT
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

import clipfix.cli.resolvers  # noqa: F401  defaults lists use them

BACKBONES = sorted(path.stem for path in (ROOT / "conf" / "backbone").glob("*.yaml") if path.stem != "tiny")


@pytest.fixture(scope="module", autouse=True)
def configs():
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        yield


def composed(*words: str) -> Any:
    """What `python -m clipfix <words> --cfg job` prints, without its start."""
    return OmegaConf.to_container(compose("config", overrides=list(words)))


@pytest.mark.parametrize(
    ("method", "backbone"), [*((method, "tiny") for method in METHODS), *(("diva", backbone) for backbone in BACKBONES)]
)
def test_every_method_and_every_backbone_composes(method, backbone):
    """Recipes alone depend on both, and these are of the tiny one."""
    config = composed(f"method={method}", f"backbone={backbone}")
    generator = "tiny/diffusion" if backbone == "tiny" else "stable-diffusion-2-1-base"
    assert generator in config["diffusion"]["path"]
    assert config["data"]["train"] == ("???" if backbone != "tiny" else config["data"]["train"])


@pytest.mark.parametrize("size", ["b32", "b16"])
def test_the_papers_fff_trains_from_nothing_and_mines_by_another_model(size):
    config = composed(f"experiment=fff-vit-{size}", "data.train=x", "eval.shards=y")
    assert config["backbone"]["pretrained"] == "random"
    assert size[1:] in config["backbone"]["name"]
    assert (config["method"]["mining"]["reference"]["name"], config["method"]["mining"]["reference"]["pretrained"]) == (
        "ViT-B-16-quickgelu",
        "openai",
    )
    assert config["data"]["texts"]["captions"] == {"key": "captions", "pick": "all", "k": 5}
    assert config["method"]["mining"]["thresholds"]["image_image"] == 0.92


def test_recipes_of_the_drawn_world_stay_in_it():
    """The tiny CLIP on its own world has its own numbers; other shards and named experiments do not see them."""
    drawn = composed("method=finetune")
    assert (drawn["method"]["train"], drawn["data"]["shuffle"]) == (["visual"], 0)
    for arguments in (["method=finetune", "data=shards"], ["experiment=pretrain_tiny_clip_words"]):
        other = composed(*arguments)
        assert other["method"]["train"] == ["visual", "text", "logit_scale"]
        assert other["data"]["texts"]["caption"]["key"] == "txt"


@pytest.mark.parametrize("group", ["data", "trainer", "logger", "eval", "diffusion", "experiment"])
def test_every_choice_of_every_group_composes(group):
    for path in sorted((ROOT / "conf" / group).glob("*.yaml")):
        assert composed(f"{group}={path.stem}")["seed"] == 0
