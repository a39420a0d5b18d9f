"""Configs as people get them wrong: keys of the real tree with another type, range or name, or none at all.

`python tests/mutations.py 500` tries so many of run=fit and prints what became of them, and `python tests/mutations.py
500 0 compare,eval` those of other verbs. test_mutations.py tries a dozen of each.
"""

import io
import os
import random
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from clipfix.__main__ import main
from clipfix.cli.settings import Config
from clipfix.cli.verbs import VERBS

CONF = Path(__file__).parents[1] / "conf"
GROUPS = ("run", "seed", "wise", "resume", "checkpoint", "trainer", "callbacks", "data", "eval", "diffusion", "method")
METHODS = ("finetune", "diva", "longclip", "fff")
# What a verb needs to pass, and its last step, which is left out: all checks come before it.
OTHER_VERBS = {
    "compare": (["compare.results=[RESULTS]"], "clipfix.results.compare.check_comparable"),
    "eval": (["eval=none"], "clipfix.evals.base.evaluate"),
    "export": (["export.to=open_clip", "export.output=out"], "clipfix.export.export"),
    "prepare": ([], "clipfix.data.scenes.World.__call__"),
    "annotate": (["annotator=features", "annotator.output=annotated"], "clipfix.annotate.annotate"),
    "thresholds": (["method=fff", "backbone=tiny"], "clipfix.annotate.survey.survey"),
    "workspace": (["logger=wandb"], "clipfix.results.workspace.workspace"),
}
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
    world = f"data.prepare.root={root}/{words[0][7:]}"  # recipes of methods draw different captions
    return said_to([*BASE, world, *words], words, "lightning.Trainer.fit")


def said_to(arguments: list[str], words: list[str], last_step: str) -> Outcome:
    """What the command says to these arguments, with its last step left out."""

    def start(*_: Any, **__: Any) -> None:
        raise Checked

    quiet, said = io.StringIO(), io.StringIO()
    with (
        patch.object(sys, "argv", ["clipfix", *arguments]),
        patch.dict(os.environ),
        patch(last_step, start),
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


def attempts_of_verbs(
    count: int, seed: int, results: Path, verbs: Sequence[str] = tuple(OTHER_VERBS)
) -> Iterator[Outcome]:
    """Yield what the verbs say to `count` wrong settings in all.

    Args:
        results: a results.json, for run=compare.
    """
    rng, trees = random.Random(seed), {}
    with initialize_config_dir(str(CONF), version_base="1.3"):
        for verb in verbs:
            config = compose("config", [f"run={verb}", *OTHER_VERBS[verb][0], *BASE])
            groups = (*VERBS[verb][1], *Config.model_fields)
            trees[verb] = [path for group in groups if group != "run" for path in leaves(config[group], group)]
    with tempfile.TemporaryDirectory() as root:
        here = Path.cwd()
        os.chdir(root)
        try:
            for number in range(count):
                verb = verbs[number % len(verbs)]
                given, last_step = OTHER_VERBS[verb]
                given = [word.replace("RESULTS", str(results)) for word in given]
                _, *words = mutate(rng, dict.fromkeys(METHODS, trees[verb]))
                world = f"data.prepare.root={root}/world"
                base = [word for word in BASE if word != "logger=csv" or verb != "workspace"]
                yield said_to([f"run={verb}", *base, world, *given, *words], [f"run={verb}", *words], last_step)
        finally:
            os.chdir(here)


if __name__ == "__main__":
    count, seed, *verbs = [*sys.argv[1:], *("0" for _ in range(3 - len(sys.argv)))]
    count, seed = int(count), int(seed)
    kinds: Counter[str] = Counter()
    stored = Path(__file__).parents[1] / "benchmarks" / "results" / "diva-s0" / "results.json"
    tried = attempts_of_verbs(count, seed, stored, verbs[0].split(",")) if verbs else attempts(count, seed)
    for outcome in tried:
        kinds[outcome.kind] += 1
        print(f"{outcome.kind}: {' '.join(outcome.words)}\n    {outcome.said.strip()}", flush=True)
    print(dict(kinds))
