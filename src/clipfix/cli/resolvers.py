"""What yaml may ask for, as in ${run_folder:...}.

Registered by a module of their own, which `verbs` imports: jobs that a launcher starts elsewhere see no __main__.
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
from yaml import YAMLError

from clipfix import CONF, PACKAGE
from clipfix.cli.sweeps import ranges
from clipfix.results import identity
from clipfix.system import ranks

IDENTITY = ("seed", "wise", "method", "data", "backbone")  # as conf/config.yaml hands them in


def run_folder(verb: str, name: str, resume: str | None, *config: Any) -> str:
    """A new folder under outputs/<name>, or with resume=auto that of the newest run of `fit` with this config, however
    far it came.

    Of several ranks the first decides: the others may have started in another second, or found it just begun.
    """
    runs = Path("outputs", verb if verb == "compare" else name)  # which compares several methods and backbones

    def decide() -> str:
        goes_on = verb == "fit" and resume == "auto"
        return str((goes_on and newest(runs, dict(zip(IDENTITY, config, strict=True)))) or new(runs))

    return ranks.agreed(decide)


def new(runs: Path) -> Path:
    """A folder named after this second, made here so that no other run that starts in it takes the same."""
    named = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    for number in count(1):
        folder = runs / (named if number == 1 else f"{named}-{number}")
        with suppress(FileExistsError):
            folder.mkdir(parents=True)
            return folder
    raise AssertionError


def newest(runs: Path, own: Mapping[str, Any]) -> Path | None:
    """The run to go on with: another seed, learning rate or corpus is another run, even where it is the newest."""
    wanted = same_run(own)
    started = sorted(runs.glob("*/config.yaml"), reverse=True)
    for file in started:
        with suppress(YAMLError):  # cut off
            stored: Any = identity.stored(file.read_text())
            if wanted and wanted == same_run(stored):
                return file.parent
    if wanted and started:
        print(
            f"No run in {runs} ({len(started)} there) has this recipe, seed, backbone and data.train: a new one "
            "begins. To go on with one of them all the same, give its file: resume=.../checkpoints/last.ckpt"
        )
    return None


def same_run(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a run and the one that it goes on with have in common; {} of a config that is incomplete or of another kind.

    Devices, precision and loggers may change: a run may go on elsewhere.
    """
    with suppress(OmegaConfBaseException, KeyError, TypeError, AttributeError):
        read = {"backbone": config["backbone"], "train": config["data"]["train"]}
        return identity.repair(config) | identity.portable(read)
    return {}


def recipe_or(group: str, recipe: str, default: str) -> str:
    """Return the option of a group that is named after a recipe, <method>-<backbone>-<data>, or the default.

    For defaults lists: a recipe sets values, but Hydra lets no file with an interpolated name choose an option.
    """
    return recipe if (CONF / group / f"{recipe}.yaml").is_file() else default


def quiet_wandb() -> None:
    """Keep W&B from printing more than errors in this process: the end of the screen is for the scores."""
    import wandb

    wandb.setup(settings=wandb.Settings(quiet=True, show_info=False, show_warnings=False))


def wandb_mode() -> str:
    """Return "online" where somebody is logged in to W&B, else "offline", without a prompt; WANDB_MODE overrides it."""
    import wandb

    quiet_wandb()
    return os.environ.get("WANDB_MODE") or ("online" if wandb.login(prompt=False) else "offline")


def wandb_group(mode: Any, sweep: str, name: str) -> str:
    """Jobs of one sweep are a group of W&B; other runs are grouped by method and backbone."""
    return f"sweep-{Path(sweep).name}" if str(mode) == "RunMode.MULTIRUN" else name


def jobs() -> int:
    """Of a sweep at a time on this machine: one a GPU; without GPUs one a core, which joblib calls -1."""
    import torch

    return torch.cuda.device_count() or -1


def register() -> None:
    OmegaConf.register_new_resolver("package", lambda path: str(PACKAGE / path), replace=True)
    OmegaConf.register_new_resolver("basename", lambda path: path.rpartition("/")[2], replace=True)
    OmegaConf.register_new_resolver("run_folder", run_folder, use_cache=True, replace=True)
    OmegaConf.register_new_resolver("recipe_or", recipe_or, replace=True)
    OmegaConf.register_new_resolver("nodes", ranks.nodes, replace=True)
    OmegaConf.register_new_resolver("devices", ranks.devices, replace=True)
    OmegaConf.register_new_resolver("wandb_mode", wandb_mode, use_cache=True, replace=True)
    OmegaConf.register_new_resolver("wandb_group", wandb_group, replace=True)
    OmegaConf.register_new_resolver("jobs", jobs, replace=True)
    OmegaConf.register_new_resolver("trials", lambda method: ranges(method)["run_cap"], replace=True)


register()
