"""Config against the constructors it is for: a value of the wrong type is named by its key, before all work."""

import inspect
import json
import pkgutil
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, get_type_hints

from pydantic import ConfigDict, PydanticUndefinedAnnotation, TypeAdapter, ValidationError
from pydantic.errors import PydanticSchemaGenerationError

CONVERT = ("none", "partial", "object", "all")  # hydra's words for what a constructor gets of lists and dicts
LENIENT = ConfigDict(arbitrary_types_allowed=True)


def check_arguments(config: Mapping[str, Any], groups: Iterable[str]) -> None:
    """Refuses what no signature below these groups of a resolved config takes, as one ValueError with all its keys.

    Annotations are the schema, read as pydantic reads JSON, strictly: 3 is a float, 3.5 no int, "3" neither. Values
    that are built themselves are checked where they are built, against their own signature.
    """
    for group in set(groups) & {"method", "data", "trainer", "backbone"}:
        if "_target_" not in config[group]:
            raise ValueError(f"{group} has no {group}._target_, the class that it configures: leave it as it was.")
    if wrong := [line for group in groups for line in complaints(config[group], group)]:
        raise ValueError("; ".join(wrong) + ".")


def complaints(node: Any, path: str) -> Iterator[str]:
    """Of a node and all below it, one a key."""
    if not isinstance(node, Mapping):
        return
    for key, value in node.items():
        yield from complaints(value, f"{path}.{key}")
    if "_target_" not in node:
        return
    try:
        signature = inspect.signature(target := pkgutil.resolve_name(node["_target_"]))
    except (ImportError, AttributeError, TypeError, ValueError):
        yield f"{path}._target_ is {node['_target_']!r}, which is no class or function"
        return
    try:
        hints = get_type_hints(target.__init__ if inspect.isclass(target) else target)
    except NameError:  # of another library, which imports some of its types for a type checker alone
        hints = {}
    for key, value in node.items():
        if key in hints and (said := misfit(value, hints[key])):
            yield f"{path}.{key} is {json.dumps(value)}: {said}"
    if node.get("_convert_", "none") not in CONVERT:
        yield f"{path}._convert_ is {node['_convert_']!r}: should be one of {', '.join(CONVERT)}"
    if not isinstance(node.get("_partial_", False), bool):
        yield f"{path}._partial_ is {node['_partial_']!r}: should be true or false"
    elif node.get("_partial_"):  # nobody gives it more
        needed = [name for name, argument in signature.parameters.items() if argument.default is argument.empty]
        yield from (f"{path}.{name} is missing" for name in needed if name not in node)


def misfit(value: Any, annotation: Any) -> str:
    """What is wrong with a value, in pydantic's words; nothing where it fits, or where it is still to be built."""
    if "_target_" in (text := json.dumps(value)):
        return ""
    try:
        TypeAdapter(annotation, config=LENIENT).validate_json(text, strict=True)
    except ValidationError as error:
        reasons = {one["msg"][0].lower() + one["msg"][1:] for one in error.errors() if one["type"] != "is_instance_of"}
        return " or ".join(sorted(reasons)).replace("input should", "should") or "is of another type"
    except (PydanticSchemaGenerationError, PydanticUndefinedAnnotation, TypeError):  # no type that JSON could hold
        return ""
    return ""
