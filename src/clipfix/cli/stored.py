"""The config in a checkpoint. It is data from a file, so it builds nothing but the known classes of a model."""

import importlib
from collections.abc import Collection, Iterator, Mapping
from pkgutil import resolve_name
from typing import Any

from omegaconf import OmegaConf

from clipfix.cli.arguments import type_errors
from clipfix.results import identity
from clipfix.system.moved import BY_PATH

# The rooms with what a model is made of. Of them, a stored config may name classes, and the functions in FUNCTIONS.
ROOMS = ("clipfix.functional.", "clipfix.methods.", "clipfix.models.", "clipfix.parts.", "clipfix.training.schedules.")
FUNCTIONS = ("clipfix.models.diffusion.blank",)
BUILT = ("method", "backbone")  # the groups of a stored config that may be built


def stored_config(saved: Mapping[str, Any], checkpoint: str, own: Any) -> Any:
    """Return the config of the run that wrote a checkpoint; None if the checkpoint has none.

    Args:
        saved: The content of the checkpoint.
        checkpoint: Its path, for error messages.
        own: The config of this run. The classes of its method and backbone are known, too.

    Raises:
        ValueError: The config is not that of a run, has interpolations, or builds something else than a model.
    """
    try:
        config = identity.stored(saved.get("config_yaml"))
        if config is not None:
            check(config, own_targets(own))
    except ValueError as error:
        raise ValueError(f"{checkpoint}: its stored config is refused: {error}") from error
    return config


def check(config: Any, own: Collection[str]) -> None:
    """Raise ValueError if a stored config is not that of a run, or builds something else than a model."""
    from clipfix.methods.base import Method
    from clipfix.models.clip import Backbone

    for group in (*BUILT, "data"):
        if not OmegaConf.is_dict(config) or not OmegaConf.is_dict(config.get(group)):
            raise ValueError(f"it has no group {group}, so no run of fit wrote it.")
    if "seed" not in config:
        raise ValueError("it has no seed, so no run of fit wrote it.")
    for group, kind in zip(BUILT, (Method, Backbone), strict=True):
        node = OmegaConf.to_container(config[group])
        assert isinstance(node, dict)
        for target in targets(node):
            if target not in own:
                check_target(group, target)
        if "_target_" not in node:
            raise ValueError(f"{group} has no _target_.")
        built = resolve_name(node["_target_"])
        if not (isinstance(built, type) and issubclass(built, kind)):
            raise ValueError(f"{group}._target_ is {node['_target_']}, which is no {kind.__name__}.")
    if errors := list(type_errors(OmegaConf.to_container(config.backbone), "backbone")):
        raise ValueError("; ".join(errors) + ".")


def own_targets(own: Any) -> set[str]:
    """Return the classes that this run's method and backbone name. Getters of hydra take any name, so they are none."""
    groups = [OmegaConf.to_container(own[group], resolve=False) for group in BUILT]
    return set(targets(groups)) - set(BY_PATH)


def targets(node: Any) -> Iterator[str]:
    """Yield the value of every `_target_` in nested dicts and lists, as text."""
    if isinstance(node, Mapping):
        if "_target_" in node:
            yield str(node["_target_"])
        for value in node.values():
            yield from targets(value)
    elif isinstance(node, list):
        for value in node:
            yield from targets(value)


def check_target(group: str, target: str) -> None:
    """Raise ValueError unless a `_target_` is a class, defined in one of `ROOMS`, or one of `FUNCTIONS`."""
    if target not in FUNCTIONS and not isinstance(found(target), type):
        raise ValueError(
            f"{group} names {target}, which is not a class of clipfix, so it is not run. If it is a method of your "
            "own, choose it on the command line: method=<its name>."
        )


def found(target: str) -> Any:
    """Return the object of a dotted name in the module that defines it; None outside of `ROOMS`."""
    module, _, name = target.rpartition(".")
    if not f"{module}.".startswith(ROOMS):
        return None
    try:
        value = getattr(importlib.import_module(module), name, None)
    except ImportError:
        return None
    return value if getattr(value, "__module__", None) == module else None
