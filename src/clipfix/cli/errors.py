"""The user's mistakes in one line each: one function an error class, with the reason why it needs one."""

import difflib
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, OmegaConfBaseException

from clipfix.system import secrets

MISTAKES = (HydraException, OmegaConfBaseException, ValueError)
CHUNK = 64  # suggested where a key that bounds memory is null


class Mistake(BaseException):
    """Carries a user error past Hydra, which would print any `Exception` itself."""


@contextmanager
def in_one_line() -> Iterator[None]:
    """Exit with one line for a mistake of the user; other errors, which are ours, keep their traceback."""
    verbose = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises errors instead of printing them its own way
    try:
        yield
    except (Mistake, *MISTAKES) as raised:
        error = raised.__cause__ if isinstance(raised, Mistake) else raised
        assert error is not None
        if verbose:
            raise error from error.__cause__
        message = secrets.hidden(one_line(explain(error)))
        sys.exit(f"clipfix: {message}\n(HYDRA_FULL_ERROR=1 shows where this was raised)")


def reraised(error: Exception, cfg: DictConfig, in_sweep: bool) -> BaseException:
    """Return what to raise in place of an error of a run: for a mistake something that ends in one line."""
    raised: Exception = out_of_memory(error, cfg) if is_out_of_memory(error) else error
    if in_sweep:
        return failed_job(raised)
    if isinstance(raised, MISTAKES):
        mistake = Mistake()
        mistake.__cause__ = raised
        return mistake
    return raised


def one_line(text: str) -> str:
    return " ".join(text.split())


def explain(error: BaseException) -> str:
    """Return the words of an error that are for the user."""
    cause = error.__cause__
    if "Original Traceback" in str(error):
        return of_a_worker(error)
    if isinstance(cause, ValueError):
        return of_a_constructor(cause)
    if isinstance(cause, ConfigAttributeError) and cause.parent_node is not None:
        return of_an_unknown_key(cause)
    if cause is not None and "Error in call to target" in str(error):
        return of_a_call(error, cause)
    return of_a_choice(error)


def of_a_worker(error: BaseException) -> str:
    """An error in a data loader's worker. Torch sends its traceback as text; only the last line is for the user."""
    return str(error).strip().rpartition("\nValueError: ")[2]


def of_a_constructor(cause: ValueError) -> str:
    """A value that a constructor refused. Hydra wraps its words in a text of its own."""
    return str(cause)


def of_a_call(error: BaseException, cause: BaseException) -> str:
    """Another error in a constructor, such as a TypeError: it does not name the config key, Hydra's text does."""
    return f"{str(error).rpartition('full_key: ')[2]}: {cause}"


def of_a_choice(error: BaseException) -> str:
    """A group without such a choice, and everything else: Hydra's words, without the list of folders it searched."""
    return str(error).split("Config search path")[0]


def of_an_unknown_key(cause: ConfigAttributeError) -> str:
    """A mistyped key. OmegaConf only says that it is not there; the user wants to see those that are."""
    wrong = str(cause.full_key)
    prefix = wrong.rpartition(".")[0]
    choices = [f"{prefix}.{key}".lstrip(".") for key in cause.parent_node if key != "hydra"]  # type: ignore[union-attr]
    close = difflib.get_close_matches(wrong, choices, n=1)
    hint = f"Did you mean {close[0]}? " if close else ""
    return f"There is no {wrong}. {hint}Choices: {', '.join(choices)}."


# -- memory ------------------------------------------------------------------------------------------------------------


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether the error means out of memory: on the GPU, on the host, or in a killed loader worker.

    Decided by names and words: importing torch for its exception would cost seconds before every other error.
    """
    signs = ("DefaultCPUAllocator", "CUDA out of memory", "killed by signal: Killed", "Unable to allocate")
    return type(error).__name__ in ("OutOfMemoryError", "MemoryError") or any(sign in str(error) for sign in signs)


def out_of_memory(error: BaseException, cfg: DictConfig) -> ValueError:
    """Return an error that names the keys of this run which take less memory, the surest first."""
    keys: list[str] = {"fit": ["data.batch_size", *memory_keys(cfg)], "annotate": ["annotator.batch_size"]}.get(
        cfg.run, []
    )
    hints = [hint for key in keys if (hint := smaller(cfg, key))]
    hints += ["raise trainer.accumulate_grad_batches, which keeps the step as large"] if cfg.run == "fit" else []
    why = str(error).strip().partition("\n")[0][:200] or type(error).__name__
    found = ValueError(f"Out of memory ({why}): {'; '.join(hints) or 'take a smaller backbone, or a larger machine'}.")
    found.__cause__ = error
    return found


def memory_keys(cfg: DictConfig) -> list[str]:
    """Return the config keys that bound the memory of a fit: those that the method declares, and its models'."""
    method: Any = get_class(cfg.method._target_)
    models = ["backbone.checkpointing", *(["diffusion.checkpointing"] if "diffusion" in cfg.method else [])]
    return [*method.memory, *models]


def smaller(cfg: DictConfig, key: str) -> str:
    """Return which other value of a key takes less memory; nothing where it is absent or already set to that."""
    group, _, name = key.rpartition(".")
    if name not in (OmegaConf.select(cfg, group) or {}):
        return ""
    value = OmegaConf.select(cfg, key)
    if value is None:
        return f"set {key}={CHUNK}"
    if value is False:
        return f"set {key}=true"
    return f"lower {key} ({value})" if value and value is not True else ""


# -- sweeps ------------------------------------------------------------------------------------------------------------


def failed_job(error: Exception) -> ValueError:
    """Print the error of a sweep's job at once, because the others go on first, and return it in one line.

    Only words come back from a job in another process.
    """
    job = HydraConfig.get()
    if not isinstance(error, MISTAKES):
        traceback.print_exception(error)
    words = " ".join(job.overrides.task)
    message = secrets.hidden(one_line(f"job {job.job.num} of the sweep: {explain(error)} [{words}]"))
    print(f"clipfix: {message}", file=sys.stderr, flush=True)
    return ValueError(message)
