"""The class that writes and reads results.json."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict

from clipfix.system import moved
from clipfix.system.terminal import all_visible

FILE = "results.json"  # in the run folder
Percentages = Mapping[str, float]  # eval/<benchmark>/<metric>


class Data(TypedDict, total=False):
    """The data of a benchmark: number and hash of local files, or urls."""

    files: int
    sha256: str | None
    urls: list[str]


@dataclass(frozen=True, eq=False, kw_only=True)
class Record:
    """The scores of one run and their provenance. The fields are the keys of results.json, in this order.

    A field is None if its value is unknown; files of older versions lack some keys.

    Args:
        model: Name of the base model, without its folder on this machine.
        data: {benchmark: {"files": number, "sha256": hash of their contents, or "urls" if they were read remotely}}.
        versions: {library: version}.
        commit: {"hash": ..., "dirty": whether files differ from it}; None outside a checkout.
        device: Name of the GPU on which the scores were computed, or "cpu".
        backbone: The chosen option of the config group `backbone`.
        method, control, wise, trained_with_seed, recipe: How the model was trained, see `identity.repair`; None for
            an untrained model.
        benchmarks: {benchmark: its settings}. `run=compare` requires equal settings.
        weights: {column of `scores`: SHA-256 of the weights}.
        precision: {"scores": ..., "training": ...}.
        checkpoint: Path of the scored checkpoint; in a run of `fit` relative to the run folder.
        step: Number of optimizer steps of that checkpoint.
        seed: Seed of this run.
        seconds: Wall time of the run, in seconds.
        peak_memory_gb: Peak memory of the GPU, or of the process without a GPU, in GB.
        scores: {"before" and "after", or "score": {`eval/<benchmark>/<metric>`: percent}}.
    """

    model: str | None = None
    data: Mapping[str, Data | str] | None = None
    versions: Mapping[str, str] | None = None
    commit: Mapping[str, Any] | None = None
    device: str | None = None
    backbone: str | None = None
    method: str | None = None
    control: str | None = None
    wise: float | None = None
    trained_with_seed: int | None = None
    recipe: Mapping[str, Any] | None = None
    benchmarks: Mapping[str, Mapping[str, Any]] | None = None
    weights: Mapping[str, str] | None = None
    precision: Mapping[str, str] | None = None
    checkpoint: str | None = None
    step: int | None = None
    seed: int | None = None
    seconds: float | None = None
    peak_memory_gb: float | None = None
    scores: Mapping[str, Percentages]

    def write(self, folder: Path) -> Path:
        """Write results.json to a folder and return its path."""
        path = folder / FILE
        path.write_text(json.dumps(asdict(self), indent=2) + "\n")
        return path

    @classmethod
    def read(cls, path: Path) -> "Record":
        """Return the record in a file. Missing keys are None, and unknown keys are ignored.

        Raises:
            ValueError: The file is not JSON, or its scores are not numbers by column and name.
        """
        try:
            stored = all_visible(moved.current(json.loads(path.read_text())))
            names = {field.name for field in fields(cls)}
            record = TypeAdapter(cls).validate_python({key: value for key, value in stored.items() if key in names})
            for name in (name for one in record.scores.values() for name in one):
                _, benchmark, metric = [*name.split("/", 2), "", ""][:3]
                if not (name.startswith("eval/") and benchmark and metric):
                    raise ValueError(f"{name!r} is not eval/<benchmark>/<metric>")
            return record
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            raise ValueError(
                f"{path} is not a results.json of run=fit or run=eval ({place}: {first['msg']}): choose another file."
            ) from None
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise ValueError(
                f"{path} is not a results.json of run=fit or run=eval ({error!r}): choose another file."
            ) from error

    @classmethod
    def of_checkpoint(cls, checkpoint: str) -> "Record | None":
        """Return the record of the run that wrote a checkpoint; None if it has no results.json."""
        run = Path(checkpoint).resolve().parents[1]  # <run folder>/checkpoints/<name>.ckpt
        return cls.read(run / FILE) if (run / FILE).is_file() else None

    @property
    def has_scores(self) -> bool:
        """Whether there is any score; there is none with `eval=none`."""
        return any(self.scores.values())

    def facts(self) -> dict[str, Any]:
        """Return all fields with a value, except the scores."""
        return {key: value for key, value in asdict(self).items() if key != "scores" and value is not None}
