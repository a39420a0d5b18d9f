"""Runs a command: one run composed by Hydra, or all jobs of a sweep."""

import logging
import os
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
from clipfix.cli.resolvers import new_folder
from clipfix.cli.run import Run
from clipfix.cli.settings import Config, check_settings, check_unread
from clipfix.cli.sweeps import check_plugins, compare_jobs, in_sweep, prepare_worker
from clipfix.cli.verbs import VERBS
from clipfix.system import secrets
from clipfix.system.ranks import environment


def run_command(arguments: list[str]) -> None:
    """Run the command with these arguments, those after the program's name."""
    sys.argv[1:] = arguments = expand_short_forms(arguments)
    logging.setLogRecordFactory(secrets.Record)
    secrets.check_words(arguments)
    check_plugins(arguments)
    if {"-m", "--multirun"}.isdisjoint(arguments):
        run()
    else:
        sweep(arguments)


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def run(cfg: DictConfig) -> float | None:
    """Run one verb, or one job of a sweep, and return the score that a sweeper optimizes."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    logging.setLogRecordFactory(secrets.Record)  # a launcher may have started a new process for this job
    try:
        if in_sweep() and "joblib" in HydraConfig.get().launcher._target_:
            prepare_worker(str(folder.parent))
        if cfg.run not in VERBS:
            raise ValueError(f"run={cfg.run} does not exist: choose from {', '.join(VERBS)}.")
        settings: Any = OmegaConf.to_container(OmegaConf.masked_copy(cfg, list(Config.model_fields)), resolve=True)
        check_settings(settings)
        check_unread(cfg.run, HydraConfig.get().overrides.task)
        verb, groups = VERBS[cfg.run]
        if missing := list(unset(OmegaConf.to_container(OmegaConf.masked_copy(cfg, list(groups))))):
            raise ValueError(f"Not set: {', '.join(missing)}. Set it on the command line: {missing[0]}=...")
        score = verb(Run.of_hydra(cfg, groups))
    except Exception as error:
        close(folder, exit_code=1)
        raised = errors.error_to_raise(error, cfg, in_sweep())
        if raised is error:
            raise
        raise raised from raised.__cause__
    except BaseException:  # Ctrl-C or SIGTERM
        close(folder, exit_code=1)
        raise
    close(folder, exit_code=0)
    return score


def close(folder: Path, exit_code: int) -> None:
    """Finish the W&B run and remove the run folder if it is empty, so that the next job of a sweep starts clean."""
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


def sweep(arguments: list[str]) -> None:
    """Run all jobs of a sweep, then compare the results of those that finished.

    The sweep folder is chosen here, because Hydra does not return the one that it chose.
    """
    if (ranks := environment()) and ranks.world_size() > 1:
        raise ValueError("torchrun and srun start the ranks of one run: start a sweep (-m) once, docs/launch.md.")
    key = "hydra.sweep.dir="
    given = [argument.removeprefix(key) for argument in arguments if argument.startswith(key)]
    folder = Path(given[-1]) if given else new_folder(Path("outputs", "sweeps"))
    sys.argv[1:] = [*arguments, *([] if given else [f"{key}{folder}"])]
    try:
        run()
    finally:
        compare_jobs(folder)
        with suppress(OSError):
            folder.rmdir()  # it is empty if no job started


def expand_short_forms(arguments: list[str]) -> list[str]:
    """Return the overrides that Hydra reads: `run=compare a.json b.json` and `run=export to=timm` are short forms."""
    if "run=export" in arguments:
        short = ("to=", "output=", "overwrite=", "dtype=", "push_to=", "licence=", "base_model=", "datasets=")
        return [f"export.{argument}" if argument.startswith(short) else argument for argument in arguments]
    if "run=compare" not in arguments:
        return arguments
    words = [one for one in arguments if not one.startswith(("-", "+")) and (one[:1] != "~" or "/" in one)]
    files = [one for one in words if ("=" not in one or os.path.exists(one))]
    if not files:
        return arguments
    quoted = ",".join("'" + file.replace("\\", "\\\\").replace("'", "\\'") + "'" for file in files)
    return [argument for argument in arguments if argument not in files] + [f"compare.results=[{quoted}]"]
