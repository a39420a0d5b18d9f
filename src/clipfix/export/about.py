"""Facts about an exported model: its base, its repair, and the scores of exactly these weights."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clipfix.models.clip import Backbone, weights_hash
from clipfix.results import provenance
from clipfix.results.record import Record


def about(
    backbone: Backbone,
    pretrained: str | None,
    repair: Mapping[str, Any],
    trained_on: Any,
    checkpoint: str | None,
    licences: Mapping[str, str],
) -> dict[str, Any]:
    """Return facts for the model card. `pretrained` and `trained_on` are the config's; `repair` as in results.json."""
    facts = provenance.facts(backbone, {})
    weights = weights_hash(backbone.model)
    record = scored(checkpoint, weights)
    told = None if pretrained is None else Path(pretrained).name  # a tag, or the name of a file without its folder
    return {
        "model": facts["model"],
        "pretrained": told,
        "licence": licences.get(told or facts["model"]),
        **repair,
        "trained_on": [portable(url) for url in ([trained_on] if isinstance(trained_on, str) else trained_on or [])],
        "weights": weights,
        "scores": record.scores if record else None,
        "results": record.facts() if record else None,
        "exported_with": {"versions": facts["versions"], "commit": facts["commit"]},
    }


def scored(checkpoint: str | None, weights: str) -> Record | None:
    """Return the record of the checkpoint's run if it scored these very weights: last.ckpt often was not scored."""
    record = Record.of_checkpoint(checkpoint) if checkpoint else None
    return record if record and (record.weights or {}).get("after") == weights else None


def portable(url: str) -> str:
    """Return a url unchanged, and only the last two parts of a path."""
    return url if "://" in url else "/".join(Path(url).parts[-2:])
