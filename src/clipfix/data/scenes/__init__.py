"""The embedded world: drawn scenes, their captions, and look-alike pairs that differ in one factor.

world.py    ground truth: things, factors, sampling, MMVP's nine patterns
drawing.py  ground truth -> picture
words.py    ground truth -> captions and look-alike statements
shards.py   all of it -> WebDataset shards on disk
"""

from clipfix.data.scenes.drawing import draw
from clipfix.data.scenes.shards import World
from clipfix.data.scenes.words import captions, pairs
from clipfix.data.scenes.world import (
    BACKGROUNDS,
    COLOURS,
    KINDS,
    PATTERNS,
    Scene,
    Thing,
    factors,
    look_alike,
    sample,
)

__all__ = [
    "BACKGROUNDS",
    "COLOURS",
    "KINDS",
    "PATTERNS",
    "Scene",
    "Thing",
    "World",
    "captions",
    "draw",
    "factors",
    "look_alike",
    "pairs",
    "sample",
]
