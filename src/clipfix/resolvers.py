"""What yaml may ask for, as in ${run_folder:...}.

Registered by a module of their own, which `verbs` imports: jobs that a launcher starts elsewhere see no __main__.
"""

import os
import re
from datetime import datetime
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from clipfix import CONF, PACKAGE, ranks


def run_folder(verb: str, name: str, resume: str | None) -> str:
    """A new folder under outputs/<name>, or with resume=auto that of the newest run of `fit`, however far it came.

    Of several ranks the first decides: the others may have started in another second, or found it just begun.
    """
    if verb == "compare":
        name = verb  # of several methods and backbones
    started = sorted(Path("outputs", name).glob("*/config.yaml"))
    new = Path("outputs", name, datetime.now().strftime("%Y-%m-%d_%H-%M-%S"))
    return ranks.agreed(str(started[-1].parent if resume == "auto" and started else new))


def wandb_mode() -> str:
    """W&B goes online where somebody is logged in, and asks nobody anything elsewhere; WANDB_MODE has the last word."""
    import wandb

    return os.environ.get("WANDB_MODE") or ("online" if wandb.login(prompt=False) else "offline")


def wandb_group(mode: Any, sweep: str, name: str) -> str:
    """Jobs of one sweep are a group of W&B; other runs are grouped by method and backbone."""
    return f"sweep-{Path(sweep).name}" if str(mode) == "RunMode.MULTIRUN" else name


def jobs() -> int:
    """Of a sweep at a time on this machine: one a GPU; without GPUs one a core, which joblib calls -1."""
    import torch

    return torch.cuda.device_count() or -1


def sweep(method: str) -> dict[str, Any]:
    """What W&B tries of a method, sweeps/<method>.yaml."""
    told: Any = OmegaConf.to_container(OmegaConf.load(CONF.parent / "sweeps" / f"{method}.yaml"), resolve=False)
    return told


def draw(config: Any, trial: Any) -> None:
    """The same for Optuna: draws for a trial what the command line did not settle, and adds the sweep's fixed words."""
    told = sweep(config.hydra.runtime.choices.method)
    words = [word for word in told["command"] if re.fullmatch(r"[\w.]+=[^$]+", word)]
    fixed = dict(word.split("=", 1) for word in words if not word.startswith(("method=", "logger=")))
    ranges = told["parameters"] | {name: {"values": [value]} for name, value in fixed.items()}
    for name, given in ranges.items():
        if name in trial.params or name in trial.user_attrs:
            continue
        if "values" in given:
            trial.suggest_categorical(name, given["values"])
        else:
            log = given["distribution"] == "log_uniform_values"
            trial.suggest_float(name, given["min"], given["max"], log=log)


def register() -> None:
    OmegaConf.register_new_resolver("package", lambda path: str(PACKAGE / path), replace=True)
    OmegaConf.register_new_resolver("run_folder", run_folder, use_cache=True, replace=True)
    OmegaConf.register_new_resolver("nodes", ranks.nodes, replace=True)
    OmegaConf.register_new_resolver("devices", ranks.devices, replace=True)
    OmegaConf.register_new_resolver("wandb_mode", wandb_mode, use_cache=True, replace=True)
    OmegaConf.register_new_resolver("wandb_group", wandb_group, replace=True)
    OmegaConf.register_new_resolver("jobs", jobs, replace=True)
    OmegaConf.register_new_resolver("trials", lambda method: sweep(method)["run_cap"], replace=True)


register()
