"""results.json: the one class that writes and reads it."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from clipfix.system import moved

FILE = "results.json"  # in the run folder
Percentages = Mapping[str, float]  # eval/<benchmark>/<metric>


@dataclass(frozen=True, eq=False, kw_only=True)
class Record:
    """The scores of one run, and where they come from. Fields are the keys of results.json, in this order.

    A field is None if nobody knows its value; files of older versions lack some keys.

    Args:
        model: Name of the base model, without its folder on this machine.
        data: {benchmark: {"files": number, "sha256": hash of their contents, or "urls" if they were read remotely}}.
        versions: {library: version}.
        commit: {"hash": ..., "dirty": whether files differ from it}; None outside a checkout.
        device: The name of the GPU that scored, or "cpu".
        backbone: The choice of the config group `backbone`.
        method, control, wise, trained_with_seed, recipe: How the model was repaired, see `identity.repair`; None of a
            model that was not.
        benchmarks: {benchmark: its settings}. Only scores by the same settings compare.
        weights: {column of `scores`: SHA-256 of the weights}.
        precision: {"scores": ..., "training": ...}.
        checkpoint: The checkpoint that was scored; a run of `fit` gives it relative to its folder.
        step: Optimizer steps of that checkpoint.
        seed: Of this run.
        seconds: Wall time of the run.
        peak_memory_gb: Of the GPU, or of this process.
        scores: {"before" and "after", or "score": {`eval/<benchmark>/<metric>`: percent}}.
    """

    model: str | None = None
    data: Mapping[str, Any] | None = None
    versions: Mapping[str, str] | None = None
    commit: Mapping[str, Any] | None = None
    device: str | None = None
    backbone: str | None = None
    method: str | None = None
    control: str | None = None
    wise: float | None = None
    trained_with_seed: int | None = None
    recipe: Mapping[str, Any] | None = None
    benchmarks: Mapping[str, Any] | None = None
    weights: Mapping[str, str] | None = None
    precision: Mapping[str, str] | None = None
    checkpoint: str | None = None
    step: int | None = None
    seed: int | None = None
    seconds: float | None = None
    peak_memory_gb: float | None = None
    scores: Mapping[str, Percentages]

    def write(self, folder: Path) -> Path:
        """Write results.json in the folder and return its path."""
        path = folder / FILE
        path.write_text(json.dumps(asdict(self), indent=2) + "\n")
        return path

    @classmethod
    def read(cls, path: Path) -> "Record":
        """Read one file; missing keys become None, and unknown ones are ignored.

        Raises:
            ValueError: The file is no JSON, or its scores are no numbers by column and name.
        """
        try:
            stored = moved.current(json.loads(path.read_text()))
            scores = {
                column: {name: float(score) for name, score in one.items()} for column, one in stored["scores"].items()
            }
            names = {field.name for field in fields(cls)}
            return cls(**{key: value for key, value in stored.items() if key in names} | {"scores": scores})
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"{path} is no result file of run=fit or run=eval ({error!r}).") from error

    @classmethod
    def of_checkpoint(cls, checkpoint: str) -> "Record | None":
        """Read the file of the run that wrote this checkpoint; None if there is none."""
        run = Path(checkpoint).resolve().parents[1]  # <run folder>/checkpoints/<name>.ckpt
        return cls.read(run / FILE) if (run / FILE).is_file() else None

    @property
    def has_scores(self) -> bool:
        """False of a run with `eval=none`."""
        return any(self.scores.values())

    def facts(self) -> dict[str, Any]:
        """Return all that is known, but for the scores."""
        return {key: value for key, value in asdict(self).items() if key != "scores" and value is not None}
