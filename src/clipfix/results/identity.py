"""The part of a run's config that its numbers depend on, equal on every machine. Every results.json holds it."""

from collections.abc import Iterator, Mapping
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from clipfix import PACKAGE
from clipfix.system import moved
from clipfix.system.secrets import hidden

# Not part of a recipe: they change where or how fast a run works, or group runs that differ by seed.
ELSEWHERE = ("seed", "root", "processes", "_convert_", "_partial_")


def stored(config_yaml: Any) -> Any:
    """Return the config that a run stored, with today's names of classes; None if it stored none.

    Raises:
        ValueError: It is not a config, or has an interpolation. A run stores resolved values, and to resolve
            `${oc.env:...}` of a file from outside would read this machine's environment.
    """
    if not config_yaml:
        return None
    if not isinstance(config_yaml, str):
        raise ValueError(f"it is not text, but {type(config_yaml).__name__}.")
    try:
        config = OmegaConf.create(config_yaml)
        values = moved.current(OmegaConf.to_container(config, resolve=False))
    except (YAMLError, OmegaConfBaseException) as error:
        raise ValueError(f"it is not a config ({' '.join(str(error).split())}).") from error
    if not isinstance(values, dict):
        raise ValueError("it is not a config.")
    if unresolved := next(interpolations(values), None):
        raise ValueError(f"it has the interpolation {unresolved}, and no run stores one.")
    return OmegaConf.create(values)


def interpolations(node: Any) -> Iterator[str]:
    """Yield the keys and values of nested dicts and lists that have an interpolation."""
    if isinstance(node, dict):
        yield from interpolations([*node, *node.values()])
    elif isinstance(node, list):
        for value in node:
            yield from interpolations(value)
    elif isinstance(node, str) and "${" in node:
        yield node


def repair(trained: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return how a model was repaired, from the config of its training. All values are None for an untrained model.

    `recipe` is equal for every seed and on every machine; `run=compare` groups runs by it. Of each `_target_` it holds
    the class name alone, so that two classes with equal settings differ, and a class may move to another module.
    """
    by: dict[str, Any] = {"method": None, "control": None, "wise": None, "trained_with_seed": None, "recipe": None}
    if trained is not None:
        method, wise = trained["method"], trained.get("wise")
        by["method"] = method["_target_"].split(".")[-2]  # the module, named as its yaml is
        by |= {"control": control(method), "wise": wise, "trained_with_seed": trained["seed"]}
        data = {key: trained["data"][key] for key in ("batch_size", "texts", "prepare") if key in trained["data"]}
        by["recipe"] = class_names(portable({"method": method, "data": data, "wise": wise}, ELSEWHERE))
    return by


def control(method: Mapping[str, Any]) -> str | None:
    """Return the name of the control that a method's config sets: `shuffled` at any depth, or no `feedback`.

    Configs of earlier versions have a key `control`.
    """
    if method.get("control"):
        return str(method["control"])
    if "feedback" in method and method["feedback"] is None:
        return "off"
    nested = [value for value in method.values() if isinstance(value, Mapping | DictConfig)]
    return "shuffled" if method.get("shuffled") is True or any(map(control, nested)) else None


def asked(cfg: DictConfig) -> dict[str, Any]:
    """Return the settings of the benchmarks: `run=compare` refuses scores of one benchmark by different settings."""
    return {"benchmarks": portable(cfg.eval.benchmarks)}


def portable(node: Any, leave_out: tuple[str, ...] = ()) -> Any:
    """Return a resolved config without some keys and secrets; paths inside the package begin with its name."""
    if isinstance(node, DictConfig | ListConfig):
        node = OmegaConf.to_container(node, resolve=True)
    if isinstance(node, dict):
        return {key: portable(value, leave_out) for key, value in node.items() if key not in leave_out}
    if isinstance(node, list):
        return [portable(value, leave_out) for value in node]
    return hidden(node.replace(str(PACKAGE), PACKAGE.name)) if isinstance(node, str) else node


def class_names(node: Any) -> Any:
    """Return nested dicts and lists in which each `_target_` is the last part of its dotted name."""
    if isinstance(node, dict):
        return {
            key: value.rpartition(".")[2] if key == "_target_" and isinstance(value, str) else class_names(value)
            for key, value in node.items()
        }
    return [class_names(value) for value in node] if isinstance(node, list) else node
