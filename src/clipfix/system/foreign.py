"""Configs that come from files: plain values, which may name only classes of clipfix or of this run's own config."""

import inspect
from collections.abc import Iterator, Mapping
from pkgutil import resolve_name
from typing import Any

from clipfix.system import moved

# A stored config may name classes of these modules: to construct one builds a part of a model, and does nothing else.
ROOMS = (
    "clipfix.functional.", "clipfix.methods.", "clipfix.models.", "clipfix.parts.", "clipfix.training.schedules.",
)  # fmt: skip

FUNCTIONS = ("clipfix.models.diffusion.blank",)  # makes a model with random weights


def check_plain(config: Any, source: str) -> None:
    """Raise ValueError if a stored config holds an interpolation, which could read the environment.

    Args:
        config: nested dicts and lists, as yaml has them.
        source: name of the file, for the message.
    """
    for place, value in _leaves(config):
        if isinstance(value, str) and "${" in value:
            raise ValueError(
                f"{source}: its stored config has {value!r} as {place}. A run stores plain values only, so another "
                "program wrote this. Nothing was read from it: remove the interpolation, or use another file."
            )


def check_classes(config: Any, source: str, own: Any = None) -> None:
    """Raise ValueError if a stored config names a function, or a class that is neither clipfix's nor named by this run.

    No module outside of clipfix is imported to find out.

    Args:
        config: nested dicts and lists.
        source: name of the file, for the message.
        own: the config of this run; classes that it names are known.
    """
    known = set(_targets(own))
    for target in _targets(config):
        if target not in known and not _is_ours(target):
            raise ValueError(
                f"{source}: its stored config names {target!r}, which is no class of clipfix. A file does not choose "
                "which code runs. If it is a method of your own, choose it on the command line too: method=<its name>."
            )


def _is_ours(target: str) -> bool:
    if target in FUNCTIONS:
        return True
    if not target.startswith(ROOMS):
        return False
    try:
        found = resolve_name(target)
    except (ImportError, AttributeError, ValueError):
        return False
    return inspect.isclass(found) and f"{found.__module__}.".startswith(ROOMS)


def _targets(config: Any) -> Iterator[str]:
    for place, value in _leaves(config):
        if place.rpartition(".")[2] == "_target_":
            yield moved.current_name(str(value))


def _leaves(config: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted name, value) of all values that are no dict or list. No interpolation is resolved."""
    if isinstance(config, Mapping):
        for key, value in config.items():
            yield from _leaves(value, f"{place}.{key}" if place else str(key))
    elif isinstance(config, list | tuple):
        for number, value in enumerate(config):
            yield from _leaves(value, f"{place}[{number}]")
    else:
        yield place, config
