"""Sweeps (`-m`): plugins of Hydra, checks for one job, search spaces for Optuna, and the comparison of all jobs."""

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

# Launchers and sweepers of Hydra that are in separate packages.
PLUGINS = {
    "hydra/launcher=parallel": "hydra-joblib-launcher",
    "hydra/launcher=joblib": "hydra-joblib-launcher",
    "hydra/launcher=submitit_slurm": "hydra-submitit-launcher",
    "hydra/launcher=submitit_local": "hydra-submitit-launcher",
    "hydra/sweeper=tune": "hydra-optuna-sweeper",
    "hydra/sweeper=optuna": "hydra-optuna-sweeper",
}


def check_plugins(arguments: list[str]) -> None:
    """Raise an error if a chosen launcher or sweeper is not installed."""
    for argument in arguments:
        if argument in PLUGINS:
            try:
                distribution(PLUGINS[argument])
            except PackageNotFoundError:
                needs = "needs a package that is not installed: pip install 'clipfix[sweep]'"
                raise ValueError(f"{argument} {needs}") from None


# -- one job -----------------------------------------------------------------------------------------------------------


def in_sweep() -> bool:
    """Return whether this run is a job of a sweep (`-m`)."""
    return not OmegaConf.is_missing(HydraConfig.get().job, "num")


def is_optuna_trial() -> bool:
    """Return whether this run is a trial of Optuna, which needs its score."""
    return in_sweep() and "optuna" in HydraConfig.get().sweeper._target_


def check_one_process(strategy: Any) -> None:
    """Raise an error if Lightning would start further ranks in a job of a sweep.

    Lightning starts them with the command line of the first rank, which in a sweep starts all jobs.
    """
    environment: Any = getattr(strategy, "cluster_environment", None)
    if in_sweep() and environment and not environment.creates_processes_externally:
        raise ValueError(
            "A job of a sweep runs in one process: set trainer.devices=1. For several GPUs per job, let SLURM start "
            "ranks: hydra/launcher=submitit_slurm hydra.launcher.tasks_per_node=4 hydra.launcher.gpus_per_node=4."
        )


def prepare_worker(folder: str) -> None:
    """Reset the start method of a joblib worker, and restrict it to the GPU that the fewest workers of the sweep use.

    Args:
        folder: The folder of the sweep.
    """
    multiprocessing.set_start_method(None, force=True)  # processes that a job starts do not know joblib's method
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        import torch

        visible = ",".join(map(str, range(torch.cuda.device_count())))
    if visible and not claim_gpu.cache_info().currsize:
        os.environ["CUDA_VISIBLE_DEVICES"] = claim_gpu(folder, visible)[0]


@cache  # a worker runs several jobs, and CUDA keeps the device that it was initialized with
def claim_gpu(folder: str, visible: str) -> tuple[str, IO[str]]:
    """Return a device of `visible`, separated by commas, and the file lock that holds it until this process ends."""
    for round_ in count():
        for device in visible.split(","):
            lock = Path(folder, f".gpu-{device}-{round_}").open("w")  # noqa: SIM115  the caller keeps it open
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.close()
            else:
                return device, lock
    raise AssertionError


# -- Optuna ------------------------------------------------------------------------------------------------------------


def search_space(method: str) -> dict[str, Any]:
    """Return the W&B sweep of a method, sweeps/<method>.yaml."""
    space: Any = OmegaConf.to_container(OmegaConf.load(CONF.parent / "sweeps" / f"{method}.yaml"), resolve=False)
    return space


def suggest(config: Any, trial: Any) -> None:
    """Suggest values for an Optuna trial from the W&B sweep of the method.

    Keys that are set on the command line are left out. Overrides in the command of the W&B sweep are added as fixed
    values.

    Args:
        config: The config of the sweep, with the node `hydra`.
        trial: The `optuna.Trial`.
    """
    space = search_space(config.hydra.runtime.choices.method)
    overrides = [word for word in space["command"] if re.fullmatch(r"[\w.]+=[^$]+", word)]
    fixed = dict(one.split("=", 1) for one in overrides if not one.startswith(("method=", "logger=")))
    parameters = space["parameters"] | {name: {"values": [value]} for name, value in fixed.items()}
    for name, parameter in parameters.items():
        if name in trial.params or name in trial.user_attrs:
            continue
        if "values" in parameter:
            trial.suggest_categorical(name, parameter["values"])
        else:
            log = parameter["distribution"] == "log_uniform_values"
            trial.suggest_float(name, parameter["min"], parameter["max"], log=log)


# -- all jobs ----------------------------------------------------------------------------------------------------------


def compare_jobs(sweep: Path) -> None:
    """Compare the jobs of a sweep, as run=compare does, if at least two of them have scores."""
    scored = [path for path in sweep.glob(f"*/{FILE}") if Record.read(path).has_scores]
    results = [str(path) for path in sorted(scored, key=lambda path: int(path.parent.name))]
    if len(results) < 2:
        return
    from clipfix.results.compare import compare

    published: Any = OmegaConf.to_container(OmegaConf.load(CONF / "published.yaml"))
    settings: Any = OmegaConf.to_container(OmegaConf.load(CONF / "config.yaml").compare)
    try:
        compare(sweep, 0, published, **settings | {"results": results})
    except ValueError as error:
        print(f"The jobs of this sweep cannot be compared: {error}")
