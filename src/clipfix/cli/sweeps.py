"""A sweep (`-m`): the launchers and sweepers of hydra, what one job may do, and the results of all side by side."""

import fcntl
import multiprocessing
import os
import re
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from itertools import count
from pathlib import Path
from typing import IO, Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from clipfix import CONF
from clipfix.results.record import FILE, Record

# Launchers and sweepers of hydra that are packages of their own.
PLUGINS = {
    "hydra/launcher=parallel": "hydra-joblib-launcher",
    "hydra/launcher=joblib": "hydra-joblib-launcher",
    "hydra/launcher=submitit_slurm": "hydra-submitit-launcher",
    "hydra/launcher=submitit_local": "hydra-submitit-launcher",
    "hydra/sweeper=tune": "hydra-optuna-sweeper",
    "hydra/sweeper=optuna": "hydra-optuna-sweeper",
}


def installed(words: list[str]) -> None:
    """Raises where a launcher or sweeper is asked for that is not there."""
    for word in words:
        if word in PLUGINS:
            try:
                distribution(PLUGINS[word])
            except PackageNotFoundError:
                needs = "needs a package that is not installed: pip install 'clipfix[sweep]'"
                raise ValueError(f"{word} {needs}") from None


# -- one job -----------------------------------------------------------------------------------------------------------


def in_sweep() -> bool:
    """Whether this is a job of a sweep (`-m`)."""
    return not OmegaConf.is_missing(HydraConfig.get().job, "num")


def judged() -> bool:
    """Whether this is a job of a sweep that wants one number of it."""
    return in_sweep() and "optuna" in HydraConfig.get().sweeper._target_


def refuse_in_sweep(strategy: Any) -> None:
    """Lightning starts other ranks by the command line of the first, which in a sweep is that of all jobs."""
    environment: Any = getattr(strategy, "cluster_environment", None)
    if in_sweep() and environment and not environment.creates_processes_externally:
        raise ValueError(
            "A job of a sweep is one process here: set trainer.devices=1. For several GPUs a job, let SLURM start its "
            "ranks: hydra/launcher=submitit_slurm hydra.launcher.tasks_per_node=4 hydra.launcher.gpus_per_node=4."
        )


def settle_worker(folder: str) -> None:
    """Makes a worker of joblib like any process, and gives it one GPU: that which fewest of this sweep have."""
    multiprocessing.set_start_method(None, force=True)  # joblib's own is unknown to the processes that a job starts
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        import torch

        visible = ",".join(map(str, range(torch.cuda.device_count())))
    if visible and not taken.cache_info().currsize:
        os.environ["CUDA_VISIBLE_DEVICES"] = taken(folder, visible)[0]


@cache  # a worker does several jobs, of several batches, and CUDA stays with the device it saw first
def taken(folder: str, visible: str) -> tuple[str, IO[str]]:
    """A device, and the lock that holds it until this process ends."""
    for round_ in count():
        for device in visible.split(","):
            lock = Path(folder, f".gpu-{device}-{round_}").open("w")  # noqa: SIM115  it outlives this
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.close()
            else:
                return device, lock
    raise AssertionError


# -- Optuna ------------------------------------------------------------------------------------------------------------


def ranges(method: str) -> dict[str, Any]:
    """What W&B tries of a method, sweeps/<method>.yaml."""
    told: Any = OmegaConf.to_container(OmegaConf.load(CONF.parent / "sweeps" / f"{method}.yaml"), resolve=False)
    return told


def draw(config: Any, trial: Any) -> None:
    """The same for Optuna: draws for a trial what the command line did not settle, and adds the sweep's fixed words."""
    told = ranges(config.hydra.runtime.choices.method)
    words = [word for word in told["command"] if re.fullmatch(r"[\w.]+=[^$]+", word)]
    fixed = dict(word.split("=", 1) for word in words if not word.startswith(("method=", "logger=")))
    tried = told["parameters"] | {name: {"values": [value]} for name, value in fixed.items()}
    for name, given in tried.items():
        if name in trial.params or name in trial.user_attrs:
            continue
        if "values" in given:
            trial.suggest_categorical(name, given["values"])
        else:
            log = given["distribution"] == "log_uniform_values"
            trial.suggest_float(name, given["min"], given["max"], log=log)


# -- all jobs ----------------------------------------------------------------------------------------------------------


def side_by_side(sweep: Path) -> None:
    """The results of a sweep as run=compare shows them, where more than one of its jobs has some."""
    scored = [path for path in sweep.glob(f"*/{FILE}") if Record.read(path).has_scores]
    found = [str(path) for path in sorted(scored, key=lambda path: int(path.parent.name))]
    if len(found) < 2:
        return
    from clipfix.results.compare import compare

    published: Any = OmegaConf.to_container(OmegaConf.load(CONF / "published.yaml"))
    settings: Any = OmegaConf.to_container(OmegaConf.load(CONF / "config.yaml").compare)
    try:
        compare(sweep, 0, published, **settings | {"results": found})
    except ValueError as error:
        print(f"The jobs of this sweep do not compare: {error}")
