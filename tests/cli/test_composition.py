"""Every choice of every group of the configs composes."""

import pytest
import yaml
from front_door import METHODS, ROOT

BACKBONES = sorted(path.stem for path in (ROOT / "conf" / "backbone").glob("*.yaml") if path.stem != "tiny")


@pytest.mark.parametrize(
    ("method", "backbone"), [*((method, "tiny") for method in METHODS), *(("diva", backbone) for backbone in BACKBONES)]
)
def test_every_method_and_every_backbone_composes(method, backbone, clipfix):
    """Recipes alone depend on both, and these are of the tiny one."""
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
    assert config["method"]["mining"]["thresholds"]["image_image"] == 0.92


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
