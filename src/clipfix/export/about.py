"""What is known of a model that is exported: its base, its repair, and scores of these very weights."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clipfix.models.clip import Backbone, weights_hash
from clipfix.results import provenance


def about(
    backbone: Backbone,
    pretrained: str | None,
    repair: Mapping[str, Any],
    trained_on: Any,
    checkpoint: str | None,
    licences: Mapping[str, str],
) -> dict[str, Any]:
    """Facts for the model card. `pretrained` and `trained_on` are the config's; `repair` is as in a result file."""
    facts = provenance.facts(backbone, {})
    weights = weights_hash(backbone.model)
    results = result_file(checkpoint, weights)
    told = None if pretrained is None else Path(pretrained).name  # a tag, or a file wherever it lies here
    return {
        "model": facts["model"],
        "pretrained": told,
        "licence": licences.get(told or facts["model"]),
        **repair,
        "trained_on": [portable(url) for url in ([trained_on] if isinstance(trained_on, str) else trained_on or [])],
        "weights": weights,
        "scores": results.pop("scores", None),
        "results": results or None,
        "exported_with": {"versions": facts["versions"], "commit": facts["commit"]},
    }


def result_file(checkpoint: str | None, weights: str) -> dict[str, Any]:
    """What the checkpoint's run measured, if it measured these very weights: last.ckpt is often not what was scored."""
    if checkpoint is None:
        return {}
    path = Path(checkpoint).resolve().parents[1] / "results.json"
    results = json.loads(path.read_text()) if path.is_file() else {}
    return results if results.get("weights", {}).get("after") == weights else {}


def portable(url: str) -> str:
    """A url as it is, a path without where it lies on this machine."""
    return url if "://" in url else "/".join(Path(url).parts[-2:])
