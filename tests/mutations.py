"""Configs as people get them wrong: keys of the real tree with another type, range or name, or none at all.

`python tests/mutations.py 500` tries so many and prints what became of them; test_mutations.py tries a dozen.
"""

import io
import os
import random
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from clipfix.__main__ import main

CONF = Path(__file__).parents[1] / "conf"
GROUPS = ("run", "seed", "wise", "resume", "checkpoint", "trainer", "callbacks", "data", "eval", "diffusion", "method")
METHODS = ("finetune", "diva", "longclip", "fff")
# Small and alike for all; a mutation stands behind it and so has the last word.
WORLD = {"train": 64, "selection": 16, "test": 16, "pairs_train": 1, "pairs_selection": 1, "pairs_test": 1}
BASE = [
    "logger=csv", "trainer=cpu", "eval=none", "data.batch_size=8", "data.workers=0", "data.shuffle=0",
    "data.prepare.summaries_test=1", "data.prepare.processes=1",
    *(f"data.prepare.{name}={size}" for name, size in WORLD.items()),
]  # fmt: skip
NUMBERS = ["-1", "0", "0.5", "-0.5", "1e9", "nan", "inf", "3"]
OTHERS = ["null", "true", "abc", "''", "[1,2]", "{a: 1}", "1,5", "[]", "/nowhere/at/all"]


class Checked(BaseException):
    """Raised where training would start: all checks before it were passed."""


@dataclass
class Outcome:
    words: list[str]
    kind: str  # passed | refused | traceback
    said: str


def leaves(node: Any, path: str) -> Iterator[str]:
    """Keys of a config that hold a value of their own, or take one from elsewhere."""
    if OmegaConf.is_dict(node):
        for key in node:
            yield from leaves(None if OmegaConf.is_interpolation(node, key) else node[key], f"{path}.{key}")
    else:
        yield path


def mutate(rng: random.Random, trees: dict[str, list[str]]) -> list[str]:
    """A method and one to three wrong words for its config."""
    method = rng.choice(METHODS)
    words = [f"method={method}"]
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        key = rng.choice(trees[method])
        how = rng.random()
        if how < 0.75:
            words.append(f"{key}={rng.choice(NUMBERS if rng.random() < 0.6 else OTHERS)}")
        elif how < 0.85:  # a slip of the finger
            place = rng.randrange(len(key))
            words.append(f"{key[:place]}{rng.choice('xyz')}{key[place + rng.randint(0, 1) :]}=1")
        elif how < 0.93:
            words.append(f"~{key}")
        else:
            group = rng.choice(("method", "data", "eval", "trainer", "diffusion", "backbone", "logger"))
            words.append(f"{group}={rng.choice(('nothing', 'none', 'tiny', 'shards', 'fsdp', 'cpu'))}")
    return words


def keys() -> dict[str, list[str]]:
    """By method, the keys that a run of it has."""
    found = {}
    with initialize_config_dir(str(CONF), version_base="1.3"):
        for method in METHODS:
            config = compose("config", [f"method={method}", *BASE])
            found[method] = [path for group in GROUPS for path in leaves(config[group], group)]
    return found


def attempt(words: list[str], root: str) -> Outcome:
    """What the command says to these words, with training itself left out."""

    def start(*_: Any, **__: Any) -> None:
        raise Checked

    world = f"data.prepare.root={root}/{words[0][7:]}"  # recipes of methods draw different captions
    quiet, said = io.StringIO(), io.StringIO()
    with (
        patch.object(sys, "argv", ["clipfix", *BASE, world, *words]),
        patch.dict(os.environ),
        patch("lightning.Trainer.fit", start),
        redirect_stdout(quiet),
        redirect_stderr(said),
    ):
        os.environ.pop("HYDRA_FULL_ERROR", None)
        try:
            main()
        except Checked:
            return Outcome(words, "passed", "")
        except SystemExit as end:
            line = str(end.code).removesuffix("\n(HYDRA_FULL_ERROR=1 shows where this was raised)")
            fine = line.startswith("clipfix: ") and "\n" not in line and len(line) < 1500 and "Traceback" not in line
            return Outcome(words, "refused" if fine else "traceback", line)
        except BaseException:
            return Outcome(words, "traceback", traceback.format_exc())
    return Outcome(words, "passed", "")


def attempts(count: int, seed: int = 0) -> Iterator[Outcome]:
    rng, trees = random.Random(seed), keys()
    with tempfile.TemporaryDirectory() as root:
        here = Path.cwd()
        os.chdir(root)
        try:
            for _ in range(count):
                yield attempt(mutate(rng, trees), root)
        finally:
            os.chdir(here)


if __name__ == "__main__":
    count, seed = (int(word) for word in [*sys.argv[1:], "0"][:2])
    kinds: Counter[str] = Counter()
    for outcome in attempts(count, seed):
        kinds[outcome.kind] += 1
        print(f"{outcome.kind}: {' '.join(outcome.words)}\n    {outcome.said.strip()}", flush=True)
    print(dict(kinds))
