"""What the config of a run says of its numbers, the same on every machine. Every results.json carries it."""

from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from clipfix import PACKAGE
from clipfix.system.secrets import hidden


def repair(trained: Mapping[str, Any] | None) -> dict[str, Any]:
    """How a model was repaired, from the config of its training; all None of one that was not.

    By its `recipe`, the same for every seed and on every machine, `run=compare` tells groups apart.
    """
    by: dict[str, Any] = {"method": None, "control": None, "wise": None, "trained_with_seed": None, "recipe": None}
    if trained is not None:
        method, wise = trained["method"], trained.get("wise")
        by["method"] = method["_target_"].split(".")[-2]  # the module, named as its yaml is
        by |= {"control": method.get("control"), "wise": wise, "trained_with_seed": trained["seed"]}
        elsewhere = ("seed", "root", "processes", "_target_", "_convert_", "_partial_")
        data = {key: trained["data"][key] for key in ("batch_size", "texts", "prepare")}
        by["recipe"] = portable({"method": method, "data": data, "wise": wise}, elsewhere)
    return by


def asked(cfg: DictConfig) -> dict[str, Any]:
    """How the benchmarks asked: `run=compare` refuses to set one scoring against another that asked otherwise."""
    return {"benchmarks": portable(cfg.eval.benchmarks)}


def portable(node: Any, leave_out: tuple[str, ...] = ()) -> Any:
    """Resolved config without some keys and secrets, and with paths inside the package as they are on every machine."""
    if isinstance(node, DictConfig | ListConfig):
        node = OmegaConf.to_container(node, resolve=True)
    if isinstance(node, dict):
        return {key: portable(value, leave_out) for key, value in node.items() if key not in leave_out}
    if isinstance(node, list):
        return [portable(value, leave_out) for value in node]
    return hidden(node.replace(str(PACKAGE), PACKAGE.name)) if isinstance(node, str) else node
