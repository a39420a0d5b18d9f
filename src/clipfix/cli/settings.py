"""The schema of the keys that no class checks: those at the top of conf/config.yaml, and the settings of the verbs.

Groups that build objects (method, data, ...) are checked against the signatures of their classes (arguments.py).
"""

import json
import os
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError


def _short(text: str) -> str:
    if any(len(os.fsencode(part)) > 255 for part in text.split("/")):
        raise ValueError("should be shorter: no file system has a name of more than 255 bytes")
    return text


Text = Annotated[str, AfterValidator(_short)]
Count = Annotated[int, Field(ge=0)]


class Settings(BaseModel):
    """Base class: values are not converted, and a key that is not listed is an error."""

    model_config = ConfigDict(strict=True, extra="forbid")


class Survey(Settings):
    samples: Annotated[int, Field(ge=2)]
    extra: Annotated[float, Field(gt=0)]


class Report(Settings):
    table: Literal["headlines", "full"]
    pictures: bool


class Compare(Settings):
    results: list[Text]
    gain: Text
    kept: Text
    resamples: Annotated[int, Field(ge=1, le=1_000_000)]
    coverage: Annotated[float, Field(gt=0, lt=1)]
    examples: Annotated[int, Field(ge=0, le=1000)]
    examples_from: Literal["files", "urls", "commands"]


class Export(Settings):
    to: Text | list[Text] | None  # null and [] are refused with the choices
    output: Text | None
    overwrite: bool
    dtype: Literal["fp32", "fp16", "bf16"]
    push_to: Text | None
    licence: Text | None
    base_model: Text | None
    datasets: list[Text]
    language: Text | list[Text]


class Config(Settings):
    """The keys outside of the groups that build objects."""

    run: str
    seed: Annotated[int, Field(ge=0, lt=2**32)]  # numpy's limit
    checkpoint: Text | None
    resume: Text | None
    wise: float | None  # weight_averaging.WiSE checks its range
    survey: Survey
    report: Report
    compare: Compare
    export: Export


# The verbs that read a key of `Config`; the others refuse it on the command line, where it would change nothing.
READ_BY = {
    "checkpoint": ("eval", "export"),
    "resume": ("fit",),
    "wise": ("fit",),
    "survey": ("thresholds",),
    "export": ("export",),
}
INSTEAD = {
    ("fit", "checkpoint"): (
        "To continue its run, set resume=<checkpoint>. To train from its weights, write them first: run=export "
        "checkpoint=<checkpoint> to=open_clip output=<folder>; then backbone=folder backbone.name=<folder>/open_clip."
    ),
    ("eval", "resume"): "Set checkpoint=<checkpoint> to score one.",
    ("export", "resume"): "Set checkpoint=<checkpoint> to export one.",
}


def check_unread(run: str, overrides: Sequence[str]) -> None:
    """Raise ValueError if the command line sets a key that this verb does not read.

    Args:
        run: the verb.
        overrides: the overrides on the command line.
    """
    for override in overrides:
        word = override.lstrip("+~")
        key = word.partition("=")[0].partition(".")[0]
        if key in READ_BY and run not in READ_BY[key] and not word.endswith("=null"):
            hint = INSTEAD.get((run, key), f"It belongs to run={' and run='.join(READ_BY[key])}: leave it out.")
            raise ValueError(f"run={run} does not read {word.partition('=')[0]}. {hint}")


def check_settings(config: Mapping[str, Any]) -> None:
    """Raise one ValueError that names every key whose value does not fit.

    Args:
        config: plain values by key, without the groups that build objects.
    """
    try:
        Config.model_validate({key: config[key] for key in Config.model_fields if key in config})
    except ValidationError as error:
        reasons = {_key(one["loc"]): one for one in error.errors()}
        raise ValueError("; ".join(f"{key} {_reason(one)}" for key, one in reasons.items()) + ".") from None


def _key(place: Sequence[int | str]) -> str:
    """Return the dotted key; pydantic puts the types of a union between its parts."""
    return ".".join(str(part) for part in place if isinstance(part, int) or part.isidentifier())


def _reason(error: Any) -> str:
    if error["type"] == "missing":
        return "is missing: remove the override that removed it"
    if error["type"] == "extra_forbidden":
        return "does not exist: remove it"
    shown = json.dumps(error["input"], default=str)
    message = str(error["msg"]).removeprefix("Value error, ").replace("Input should", "should")
    return f"is {shown if len(shown) < 80 else shown[:76] + ' ...'}: {message[0].lower()}{message[1:]}"
