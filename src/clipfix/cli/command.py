"""The command: its words, one run by Hydra, or all jobs of a sweep."""

import logging
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from clipfix import CONF
from clipfix.cli import errors
from clipfix.cli.resolvers import new
from clipfix.cli.run import Run
from clipfix.cli.sweeps import in_sweep, installed, settle_worker, side_by_side
from clipfix.cli.verbs import VERBS
from clipfix.system import secrets
from clipfix.system.ranks import environment


def start(words: list[str]) -> None:
    """Run the command with these words, which stand behind its name."""
    sys.argv[1:] = words = named(words)
    logging.setLogRecordFactory(secrets.Record)
    secrets.check_words(words)
    installed(words)
    if {"-m", "--multirun"}.isdisjoint(words):
        run()
    else:
        sweep(words)


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def run(cfg: DictConfig) -> float | None:
    """Run one verb, or one job of a sweep; return what a sweeper judges it by."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    logging.setLogRecordFactory(secrets.Record)  # again, in a process that a launcher started
    try:
        if in_sweep() and "joblib" in HydraConfig.get().launcher._target_:
            settle_worker(str(folder.parent))
        if cfg.run not in VERBS:
            raise ValueError(f"run={cfg.run} is no verb: choose from {', '.join(VERBS)}.")
        verb, groups = VERBS[cfg.run]
        if missing := list(unset(OmegaConf.to_container(OmegaConf.masked_copy(cfg, list(groups))))):
            raise ValueError(f"Not set: {', '.join(missing)}. Give a value on the command line, as in {missing[0]}=...")
        score = verb(Run.of_hydra(cfg, groups))
    except Exception as error:
        close(folder, exit_code=1)
        raised = errors.reraised(error, cfg, in_sweep())
        if raised is error:
            raise
        raise raised from raised.__cause__
    except BaseException:  # Ctrl-C, or asked to stop
        close(folder, exit_code=1)
        raise
    close(folder, exit_code=0)
    return score


def close(folder: Path, exit_code: int) -> None:
    """Finish W&B's run and remove an empty folder, so that the next run of a sweep starts clean."""
    if "wandb" in sys.modules:
        sys.modules["wandb"].finish(exit_code=exit_code)
    with suppress(OSError):
        folder.rmdir()


def unset(node: Any, path: str = "") -> Iterator[str]:
    """Yield the paths of the keys whose value is still ???."""
    if node == "???":
        yield path.removeprefix(".")
    elif isinstance(node, dict):
        for key, value in node.items():
            yield from unset(value, f"{path}.{key}")


def sweep(words: list[str]) -> None:
    """Run all jobs, then show the results of those that finished side by side.

    The folder is chosen here, because Hydra does not say which one it took.
    """
    if (ranks := environment()) and ranks.world_size() > 1:
        raise ValueError("torchrun and srun start the ranks of one run: start a sweep (-m) once, docs/launch.md.")
    key = "hydra.sweep.dir="
    given = [word.removeprefix(key) for word in words if word.startswith(key)]
    folder = Path(given[-1]) if given else new(Path("outputs", "sweeps"))
    sys.argv[1:] = [*words, *([] if given else [f"{key}{folder}"])]
    try:
        run()
    finally:
        side_by_side(folder)
        with suppress(OSError):
            folder.rmdir()  # empty where no job began


def named(words: list[str]) -> list[str]:
    """Turn short words into those that Hydra knows: `run=compare a.json b.json`, `run=export to=timm output=folder`."""
    if "run=export" in words:
        short = ("to=", "output=", "overwrite=", "dtype=", "push_to=", "licence=")
        return [f"export.{word}" if word.startswith(short) else word for word in words]
    if "run=compare" not in words:
        return words
    files = [word for word in words if not word.startswith("-") and ("=" not in word or Path(word).exists())]
    if not files:
        return words
    quoted = ",".join("'" + file.replace("\\", "\\\\").replace("'", "\\'") + "'" for file in files)
    return [word for word in words if word not in files] + [f"compare.results=[{quoted}]"]
