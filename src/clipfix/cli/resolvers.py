"""Resolvers for the config, such as ${run_folder:...}.

They are registered on import of this module. `verbs` imports it, because jobs of a launcher do not run __main__.
"""

import os
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from clipfix import CONF, PACKAGE
from clipfix.cli.sweeps import search_space
from clipfix.results import identity
from clipfix.system import ranks

IDENTITY = ("seed", "wise", "method", "data", "backbone")  # in the order of the arguments in conf/config.yaml


def run_folder(verb: str, name: str, resume: str | None, *config: Any) -> str:
    """Return a new folder in outputs/<name>, or with `resume=auto` the folder of the newest fit with this config.

    Rank 0 decides for all ranks, because the names of new folders depend on the second in which a rank starts.

    Args:
        verb: The value of `run`.
        name: <method>-<backbone>.
        resume: The value of `resume`.
        config: The values of the keys in `IDENTITY`.
    """
    runs = Path("outputs", verb if verb == "compare" else name)  # a comparison has no single method and backbone

    def decide() -> str:
        resumes = verb == "fit" and resume == "auto"
        current = dict(zip(IDENTITY, config, strict=True))
        return str((resumes and newest_same_run(runs, current)) or new_folder(runs))

    return ranks.agreed(decide)


def new_folder(runs: Path) -> Path:
    """Make and return a folder named after this second. Runs that start in the same second get different folders."""
    name = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    for number in count(1):
        folder = runs / (name if number == 1 else f"{name}-{number}")
        with suppress(FileExistsError):
            folder.mkdir(parents=True)
            return folder
    raise AssertionError


def newest_same_run(runs: Path, config: Mapping[str, Any]) -> Path | None:
    """Return the folder of the newest run whose `same_run` equals that of this config; None if there is none."""
    wanted = same_run(config)
    started = sorted(runs.glob("*/config.yaml"), reverse=True)
    for file in started:
        with suppress(ValueError):  # a run that was killed while writing it, or a file of another program
            stored: Any = identity.stored(file.read_text())
            if wanted and wanted == same_run(stored):
                return file.parent
    if wanted and started:
        print(
            f"resume=auto: none of the {len(started)} runs in {runs} has this recipe, seed, backbone and data.train. "
            "A new run starts. To continue one of them, give its checkpoint: resume=.../checkpoints/last.ckpt"
        )
    return None


def same_run(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a config that must be equal for a run to be resumed; {} of an incomplete or foreign config.

    Devices, precision and loggers are not part of it, because a run may be resumed on another machine.
    """
    with suppress(OmegaConfBaseException, KeyError, TypeError, AttributeError):
        inputs = {"backbone": config["backbone"], "train": config["data"]["train"]}
        return identity.repair(config) | identity.portable(inputs)
    return {}


def recipe_or(group: str, recipe: str, default: str) -> str:
    """Return the option of a group that is named after a recipe, <method>-<backbone>-<data>, or the default.

    Defaults lists use it, because Hydra does not let a recipe, whose name is interpolated, choose an option of a group.
    """
    return recipe if (CONF / group / f"{recipe}.yaml").is_file() else default


def quiet_wandb() -> None:
    """Make W&B print errors only, so that the scores are the last lines on the screen."""
    import wandb

    wandb.setup(settings=wandb.Settings(quiet=True, show_info=False, show_warnings=False))


def wandb_mode() -> str:
    """Return WANDB_MODE if it is set, else "online" if the user is logged in to W&B, else "offline". Never prompt."""
    import wandb

    quiet_wandb()
    return os.environ.get("WANDB_MODE") or ("online" if wandb.login(prompt=False) else "offline")


def wandb_group(mode: Any, sweep: str, name: str) -> str:
    """Return the W&B group of a run: the sweep that it belongs to, else its method and backbone."""
    return f"sweep-{Path(sweep).name}" if str(mode) == "RunMode.MULTIRUN" else name


def parallel_jobs() -> int:
    """Return the number of parallel sweep jobs: one per GPU, or -1 (all cores) without GPUs."""
    import torch

    return torch.cuda.device_count() or -1


def register() -> None:
    """Register all resolvers with OmegaConf."""
    OmegaConf.register_new_resolver("package", lambda path: str(PACKAGE / path), replace=True)
    OmegaConf.register_new_resolver("basename", lambda path: path.rpartition("/")[2], replace=True)
    OmegaConf.register_new_resolver("run_folder", run_folder, use_cache=True, replace=True)
    OmegaConf.register_new_resolver("recipe_or", recipe_or, replace=True)
    OmegaConf.register_new_resolver("nodes", ranks.nodes, replace=True)
    OmegaConf.register_new_resolver("devices", ranks.devices, replace=True)
    OmegaConf.register_new_resolver("wandb_mode", wandb_mode, use_cache=True, replace=True)
    OmegaConf.register_new_resolver("wandb_group", wandb_group, replace=True)
    OmegaConf.register_new_resolver("jobs", parallel_jobs, replace=True)
    OmegaConf.register_new_resolver("trials", lambda method: search_space(method)["run_cap"], replace=True)


register()
