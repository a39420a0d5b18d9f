"""The command line: compose the config, run its verb, and answer mistakes in one line."""

import difflib
import logging
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, OmegaConfBaseException

from clipfix import CONF
from clipfix.cli.resolvers import new
from clipfix.cli.sweeps import in_sweep, installed, settle_worker, side_by_side
from clipfix.cli.verbs import VERBS
from clipfix.system import secrets
from clipfix.system.ranks import environment

MISTAKES = (HydraException, OmegaConfBaseException, ValueError)


class Mistake(BaseException):
    """Of the user, its cause, on its way to `main`: hydra would announce an Exception in a line of its own."""


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def run(cfg: DictConfig) -> float | None:
    """One run, or one job of a sweep; what it returns is what a sweeper judges it by."""
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
        score = verb(cfg, folder)
    except Exception as error:
        close(folder, exit_code=1)
        told: Exception = error
        if is_out_of_memory(error):
            told = ValueError(smaller(cfg, error))
            told.__cause__ = error
        if in_sweep():
            raise failed(told) from None
        if isinstance(told, MISTAKES):
            raise Mistake from told
        raise
    except BaseException:  # Ctrl-C, or asked to stop
        close(folder, exit_code=1)
        raise
    close(folder, exit_code=0)
    return score


def failed(error: Exception) -> ValueError:
    """Of a job of a sweep, told at once: the others go on first, and only words come back from another process."""
    job = HydraConfig.get()
    if not isinstance(error, MISTAKES):
        traceback.print_exception(error)
    words = " ".join(job.overrides.task)
    said = secrets.hidden(one_line(f"job {job.job.num} of the sweep: {explain(error)} [{words}]"))
    print(f"clipfix: {said}", file=sys.stderr, flush=True)
    return ValueError(said)


def is_out_of_memory(error: BaseException) -> bool:
    """Of a GPU, of this machine, or of a worker that the system killed for it; torch is not imported for this."""
    signs = ("DefaultCPUAllocator", "CUDA out of memory", "killed by signal: Killed", "Unable to allocate")
    return type(error).__name__ in ("OutOfMemoryError", "MemoryError") or any(sign in str(error) for sign in signs)


def smaller(cfg: DictConfig, error: BaseException) -> str:
    """Which keys of this run take less memory, the surest first."""
    lower = {"fit": ["data.batch_size", "method.chunk", "method.objective.tile"], "annotate": ["annotator.batch_size"]}
    turn_on = {"fit": ["backbone.checkpointing", *(["diffusion.checkpointing"] if "diffusion" in cfg.method else [])]}
    hints = [f"lower {key} ({value})" for key in lower.get(cfg.run, []) if (value := OmegaConf.select(cfg, key))]
    hints += [f"set {key}=true" for key in turn_on.get(cfg.run, []) if OmegaConf.select(cfg, key) is False]
    if cfg.run == "fit":
        hints += ["set method.chunk=64"] if cfg.method.get("chunk", 0) is None else []
        hints += ["raise trainer.accumulate_grad_batches, which keeps the step as large"]
    why = str(error).strip().partition("\n")[0][:200] or type(error).__name__
    return f"Out of memory ({why}): {'; '.join(hints) or 'take a smaller backbone, or a larger machine'}."


def close(folder: Path, exit_code: int) -> None:
    """Leaves nothing behind that the next run of a sweep would stumble over: no open W&B run, no empty folder."""
    if "wandb" in sys.modules:
        sys.modules["wandb"].finish(exit_code=exit_code)
    with suppress(OSError):
        folder.rmdir()


def unset(node: Any, path: str = "") -> Iterator[str]:
    """Paths of the keys whose value is still ???."""
    if node == "???":
        yield path.removeprefix(".")
    elif isinstance(node, dict):
        for key, value in node.items():
            yield from unset(value, f"{path}.{key}")


def main() -> None:
    """The command: one readable line for the user's mistakes, a traceback for ours."""
    sys.argv[1:] = words = named(sys.argv[1:])
    verbose = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # hydra then hands errors on instead of printing them its own way
    logging.setLogRecordFactory(secrets.Record)
    try:
        secrets.check_words(words)
        installed(words)
        if {"-m", "--multirun"}.isdisjoint(words):
            run()
        else:
            sweep(words)
    except (Mistake, *MISTAKES) as raised:
        error = raised.__cause__ if isinstance(raised, Mistake) else raised
        assert error is not None
        if verbose:
            raise error from error.__cause__
        said = secrets.hidden(one_line(explain(error)))
        sys.exit(f"clipfix: {said}\n(HYDRA_FULL_ERROR=1 shows where this was raised)")


def sweep(words: list[str]) -> None:
    """All jobs, then the results of those that finished side by side. Hydra does not tell which folder it chose."""
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
    """Short words in those that hydra knows: `run=compare a.json b.json`, and `run=export to=timm output=folder`."""
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


def one_line(text: str) -> str:
    return " ".join(text.split())


def explain(error: BaseException) -> str:
    """The error's own words, and for a mistyped key the keys that exist."""
    if "Original Traceback" in str(error):  # of a worker process: only its last line is for the user
        return str(error).strip().rpartition("\nValueError: ")[2]
    cause = error.__cause__
    if isinstance(cause, ValueError):  # hydra wraps what a constructor raised in its own text
        return str(cause)
    if not isinstance(cause, ConfigAttributeError) or cause.parent_node is None:
        if cause is not None and "Error in call to target" in str(error):
            return f"{str(error).rpartition('full_key: ')[2]}: {cause}"
        return str(error).split("Config search path")[0]
    wrong = str(cause.full_key)
    prefix = wrong.rpartition(".")[0]
    choices = [f"{prefix}.{key}".lstrip(".") for key in cause.parent_node if key != "hydra"]
    close = difflib.get_close_matches(wrong, choices, n=1)
    hint = f"Did you mean {close[0]}? " if close else ""
    return f"There is no {wrong}. {hint}Choices: {', '.join(choices)}."


if __name__ == "__main__":
    main()
