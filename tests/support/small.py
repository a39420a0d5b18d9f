"""Any method of conf/method/ on small models, and a batch for it."""

from functools import cache
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

import clipfix.__main__  # noqa: F401  the resolvers that the configs use
from clipfix.methods.base import Method
from clipfix.models.clip import Backbone

CONF = Path(__file__).parents[2] / "conf"
METHODS = sorted(path.stem for path in (CONF / "method").glob("*.yaml"))
SMALL: dict[str, dict[str, object]] = {  # settings for the small models
    "diva": {
        "condition": {"patches": {"amount": 7}}
    },  # eight tokens with the class token, as the small generator requires
    "longclip": {"keep_tokens": 6, "ratio": 3, "components": 3},  # of 16 positions, in small batches
}
WORDS = ["red", "blue", "fish", "house", "star", "heart", "left", "right", "open", "two", "three", "above"]


@cache
def composed(name: str, groups: tuple[str, ...]) -> DictConfig:
    """Return the config of a method as composed with a pretrained backbone, without recipes of the drawn world."""
    GlobalHydra.instance().clear()
    parts = [f"{group.partition('=')[0]}@method.{group}" for group in groups]
    words = [
        f"method={name}",
        "backbone=vit-b32",
        "data.train=none",
        *[
            word.replace("@method.thresholds", "@method.mining.thresholds").replace(
                "patches@method.patches", "patches@method.condition.patches"
            )
            for word in parts
        ],
    ]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        node = compose("config", words).method
    return OmegaConf.create({"method": OmegaConf.to_container(node, resolve=False)})


def build(name: str, clip_folder: str, generator_folder: str, *groups: str, **overrides: Any) -> Method:
    """Return the method of a yaml file, on small models with random weights, with four steps.

    Args:
        groups: choices of config groups, as in `feedback=contrastive`.
        overrides: keys of the method, merged into its config.
    """
    diffusion = {"_target_": "clipfix.models.diffusion.Diffusion", "path": generator_folder, "dtype": "fp32"}
    reference = {"_target_": "clipfix.models.clip.Backbone", "name": clip_folder, "pretrained": "random"}
    config = OmegaConf.merge({"backbone": reference, "diffusion": diffusion}, composed(name, groups))
    suits = SMALL.get(name, {}) if not any(group.startswith(("condition=", "patches=")) for group in groups) else {}
    shared = {"steps": 4, "schedule": {"warmup_steps": 1}}
    for settings in (shared, suits, overrides):
        for key, value in settings.items():
            node = config.method.get(key)
            if key != "optimizer" and isinstance(value, dict) and OmegaConf.is_dict(node):
                config.method[key] = OmegaConf.merge(node, value)
            else:
                config.method[key] = value
    torch.manual_seed(0)
    method = instantiate(config.method, backbone=Backbone(clip_folder, pretrained="random"))
    for clip in method.modules():
        if isinstance(
            clip, Backbone
        ):  # random token embeddings are tiny at first, so all texts would have the same features
            words = torch.Generator().manual_seed(1)
            torch.nn.init.normal_(clip.text.get_parameter("token_embedding.weight"), std=0.5, generator=words)
    return method


def batch(rows: int, seed: int = 0) -> dict:
    """Return a random batch with all texts that methods read."""
    generator = torch.Generator().manual_seed(seed)
    short, long = (
        [" ".join(WORDS[int(i)] for i in torch.randint(len(WORDS), (words,), generator=generator)) for _ in range(rows)]
        for words in (4, 30)
    )
    image = torch.rand(rows, 3, 32, 32, generator=generator)
    captions = [f"{opening} {text}" for text in short for opening in ("a", "a photo of")]
    return {"image": image, "caption": short, "captions": captions, "long": long, "skipped": 0}
