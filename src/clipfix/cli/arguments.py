"""Checks a config against the signatures of the classes it builds, before any work is done."""

import inspect
import json
import pkgutil
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, get_type_hints

from pydantic import ConfigDict, PydanticUndefinedAnnotation, TypeAdapter, ValidationError
from pydantic.errors import PydanticSchemaGenerationError

CONVERT = ("none", "partial", "object", "all")  # Hydra's modes for passing lists and dicts to a constructor
LENIENT = ConfigDict(arbitrary_types_allowed=True)


def check_arguments(config: Mapping[str, Any], groups: Iterable[str]) -> None:
    """Raise one ValueError that names every key whose value does not fit the signature of its class.

    Annotations are the schema. Pydantic validates values strictly, as JSON: 3 is a float, 3.5 is not an int, and "3" is
    neither. A value with a `_target_` of its own is checked against the signature of that target.

    Args:
        config: A resolved config, by group.
        groups: The groups to check.
    """
    for group in set(groups) & {"method", "data", "trainer", "backbone"}:
        if "_target_" not in config[group]:
            raise ValueError(f"{group}._target_ is missing: remove the override that replaced the group {group}.")
    if errors := [error for group in groups for error in type_errors(config[group], group)]:
        raise ValueError("; ".join(errors) + ".")


def type_errors(node: Any, path: str) -> Iterator[str]:
    """Yield one message for each key, in a node and all nodes below it, whose value does not fit."""
    if not isinstance(node, Mapping):
        return
    for key, value in node.items():
        yield from type_errors(value, f"{path}.{key}")
    if "_target_" not in node:
        return
    try:
        signature = inspect.signature(target := pkgutil.resolve_name(node["_target_"]))
    except (ImportError, AttributeError, TypeError, ValueError):
        yield f"{path}._target_ is {node['_target_']!r}, which is not a class or function"
        return
    try:
        hints = get_type_hints(target.__init__ if inspect.isclass(target) else target)
    except NameError:  # other libraries import some types only under TYPE_CHECKING
        hints = {}
    for key, value in node.items():
        if key in hints and (reason := mismatch(value, hints[key])):
            yield f"{path}.{key} is {json.dumps(value)}: {reason}"
    if node.get("_convert_", "none") not in CONVERT:
        yield f"{path}._convert_ is {node['_convert_']!r}: should be one of {', '.join(CONVERT)}"
    if not isinstance(node.get("_partial_", False), bool):
        yield f"{path}._partial_ is {node['_partial_']!r}: should be true or false"
    elif node.get("_partial_"):  # the caller passes no further arguments to such a partial
        required = [name for name, argument in signature.parameters.items() if argument.default is argument.empty]
        yield from (f"{path}.{name} is missing" for name in required if name not in node)


def mismatch(value: Any, annotation: Any) -> str:
    """Return why a value does not fit an annotation, as pydantic words it; "" if it fits or contains a `_target_`."""
    if "_target_" in (text := json.dumps(value)):
        return ""
    try:
        TypeAdapter(annotation, config=LENIENT).validate_json(text, strict=True)
    except ValidationError as error:
        reasons = {one["msg"][0].lower() + one["msg"][1:] for one in error.errors() if one["type"] != "is_instance_of"}
        return " or ".join(sorted(reasons)).replace("input should", "should") or "is of another type"
    except (PydanticSchemaGenerationError, PydanticUndefinedAnnotation, TypeError):  # a type that JSON cannot express
        return ""
    return ""
