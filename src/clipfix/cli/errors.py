"""One-line messages for errors of the user. Each kind of error has one function, whose docstring says why."""

import difflib
import os
import re
import shlex
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
from clipfix.system.terminal import visible

USER_ERRORS = (HydraException, OmegaConfBaseException, ValueError)
CHUNK = 64  # the suggested value of a key that bounds memory and is null


class UserError(BaseException):
    """Carries a user error past Hydra, which would print any `Exception` itself."""


@contextmanager
def in_one_line() -> Iterator[None]:
    """Exit with a one-line message after a user error. Other errors are bugs and keep their traceback."""
    verbose = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises errors instead of printing them
    try:
        yield
    except (UserError, *USER_ERRORS) as raised:
        error = raised.__cause__ if isinstance(raised, UserError) else raised
        assert error is not None
        if verbose:
            raise error from error.__cause__
        message = visible(secrets.hidden(one_line(explain(error))))
        sys.exit(f"clipfix: {message}\n(HYDRA_FULL_ERROR=1 shows where this was raised)")


def error_to_raise(error: Exception, cfg: DictConfig, in_sweep: bool) -> BaseException:
    """Return the exception to raise in place of an error of a run: a `UserError` if it is an error of the user."""
    raised: Exception = out_of_memory(error, cfg) if is_out_of_memory(error) else error
    if in_sweep:
        return failed_job(raised)
    if isinstance(raised, USER_ERRORS):
        user_error = UserError()
        user_error.__cause__ = raised
        return user_error
    return raised


def one_line(text: str) -> str:
    return " ".join(text.split())


def explain(error: BaseException) -> str:
    """Return the part of an error's message that helps the user."""
    cause = error.__cause__
    if "Original Traceback" in str(error):
        return loader_worker_message(error)
    if quoted := quoting_hint(error):
        return quoted
    if type(error) is ValueError:  # our own, whatever it was raised from
        return str(error)
    if isinstance(cause, ValueError):
        return constructor_message(cause)
    if isinstance(cause, ConfigAttributeError) and cause.parent_node is not None:
        return unknown_key_message(cause)
    if cause is not None and "Error in call to target" in str(error):
        return call_message(error, cause)
    return config_message(error)


def quoting_hint(error: BaseException) -> str:
    """Return how to quote a value with `=`, commas, brackets or other letters; "" for other errors.

    Hydra's own message shows quotes that the shell removes.
    """
    override = getattr(error, "override", None)
    if ambiguous := re.match(r"Ambiguous value for argument '(.*)'\n", str(error)):
        override = ambiguous[1]
    if not isinstance(override, str) or "=" not in override:
        return ""
    key, _, value = override.partition("=")
    quoted = shlex.quote(f'{key}="{value}"' if '"' not in value else f"{key}={value}")
    return (
        f"{override} cannot be read as a setting. A value with =, commas, brackets or letters such as ä needs double "
        f"quotes inside of single ones: {quoted} (a list is {key}=[a,b]; several runs are -m {key}=a,b)."
    )


def loader_worker_message(error: BaseException) -> str:
    """Return the message of an error in a data loader's worker: the last line of the traceback that torch sends."""
    return str(error).strip().rpartition("\nValueError: ")[2]


def constructor_message(cause: ValueError) -> str:
    """Return the message of a ValueError that a constructor raised. Hydra wraps it in a message of its own."""
    return str(cause)


def call_message(error: BaseException, cause: BaseException) -> str:
    """Return the message of another error in a constructor, such as a TypeError, with the config key.

    The key is only in Hydra's message.
    """
    return f"{str(error).rpartition('full_key: ')[2]}: {cause}"


def config_message(error: BaseException) -> str:
    """Return Hydra's message, as of a group that lacks the requested choice, without the folders that it searched."""
    return str(error).split("Config search path")[0]


def unknown_key_message(cause: ConfigAttributeError) -> str:
    """Return a message for a mistyped key that lists the keys of its group. OmegaConf's message lists none."""
    wrong = str(cause.full_key)
    prefix = wrong.rpartition(".")[0]
    choices = [f"{prefix}.{key}".lstrip(".") for key in cause.parent_node if key != "hydra"]  # type: ignore[union-attr]
    close = difflib.get_close_matches(wrong, choices, n=1)
    hint = f"Did you mean {close[0]}? " if close else ""
    return f"There is no {wrong}. {hint}Choices: {', '.join(choices)}."


# -- memory ------------------------------------------------------------------------------------------------------------


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether the error means out of memory: on the GPU, on the host, or in a killed loader worker.

    The test is by class name and message. Importing torch for its exception would delay every other error by seconds.
    """
    signs = ("DefaultCPUAllocator", "CUDA out of memory", "killed by signal: Killed", "Unable to allocate")
    return type(error).__name__ in ("OutOfMemoryError", "MemoryError") or any(sign in str(error) for sign in signs)


def out_of_memory(error: BaseException, cfg: DictConfig) -> ValueError:
    """Return an error that names the config keys of this run that reduce memory, the most effective first."""
    keys: list[str] = {"fit": ["data.batch_size", *memory_keys(cfg)], "annotate": ["annotator.batch_size"]}.get(
        cfg.run, []
    )
    hints = [hint for key in keys if (hint := memory_hint(cfg, key))]
    hints += (
        ["raise trainer.accumulate_grad_batches to keep the number of images in a step"] if cfg.run == "fit" else []
    )
    reason = str(error).strip().partition("\n")[0][:200] or type(error).__name__
    advice = "; ".join(hints) or "choose a smaller backbone or a machine with more memory"
    value_error = ValueError(f"Out of memory ({reason}): {advice}.")
    value_error.__cause__ = error
    return value_error


def memory_keys(cfg: DictConfig) -> list[str]:
    """Return the config keys that bound the memory of a fit: those that the method declares and those of its models."""
    method: Any = get_class(cfg.method._target_)
    models = ["backbone.checkpointing", *(["diffusion.checkpointing"] if "diffusion" in cfg.method else [])]
    return [*method.memory, *models]


def memory_hint(cfg: DictConfig, key: str) -> str:
    """Return how to change a key so that a run needs less memory; "" if the key is absent or already set that way."""
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
    """Print the error of a sweep's job and return it as a ValueError with one line.

    It is printed at once, because the remaining jobs run first. It is reduced to text, because a job may run in another
    process, from which exceptions do not come back intact.
    """
    job = HydraConfig.get()
    if not isinstance(error, USER_ERRORS):
        traceback.print_exception(error)
    overrides = " ".join(job.overrides.task)
    message = secrets.hidden(one_line(f"job {job.job.num} of the sweep: {explain(error)} [{overrides}]"))
    print(f"clipfix: {message}", file=sys.stderr, flush=True)
    return ValueError(message)
