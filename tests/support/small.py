"""Any method of conf/method/ on small models, and a batch for it: what the contract and two-rank tests share."""

from pathlib import Path

import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from clipfix.methods.base import Method
from clipfix.models.clip import Backbone

CONF = Path(__file__).parents[2] / "conf"
METHODS = sorted(path.stem for path in (CONF / "method").glob("*.yaml"))
SMALL: dict[str, dict[str, object]] = {  # what a method must know of the small models
    "diva": {"patch_amount": 7},  # with the class token the eight tokens of the small generator's text
    "longclip": {"keep_tokens": 6, "ratio": 3, "components": 3},  # of 16 positions, in small batches
}
WORDS = ["red", "blue", "fish", "house", "star", "heart", "left", "right", "open", "two", "three", "above"]


def build(name: str, clip_folder: str, generator_folder: str, **overrides: object) -> Method:
    """The method as its yaml configures it, on random small models, a few steps long."""
    diffusion = {"_target_": "clipfix.models.diffusion.Diffusion", "path": generator_folder, "dtype": "fp32"}
    reference = {"_target_": "clipfix.models.clip.Backbone", "name": clip_folder, "pretrained": "random"}
    config = OmegaConf.create(
        {"backbone": reference, "diffusion": diffusion, "method": OmegaConf.load(CONF / "method" / f"{name}.yaml")}
    )
    config.method.update({"steps": 4, "warmup_steps": 1, **SMALL.get(name, {}), **overrides})
    torch.manual_seed(0)
    method = instantiate(config.method, backbone=Backbone(clip_folder, pretrained="random"))
    for clip in method.modules():
        if isinstance(clip, Backbone):  # words of a random one start at nothing, so all would say the same
            words = torch.Generator().manual_seed(1)
            torch.nn.init.normal_(clip.text.get_parameter("token_embedding.weight"), std=0.5, generator=words)
    return method


def batch(rows: int, seed: int = 0) -> dict:
    generator = torch.Generator().manual_seed(seed)
    short, long = (
        [" ".join(WORDS[int(i)] for i in torch.randint(len(WORDS), (words,), generator=generator)) for _ in range(rows)]
        for words in (4, 30)
    )
    image = torch.rand(rows, 3, 32, 32, generator=generator)
    captions = [f"{opening} {text}" for text in short for opening in ("a", "a photo of")]
    return {"image": image, "caption": short, "captions": captions, "long": long, "skipped": 0}
