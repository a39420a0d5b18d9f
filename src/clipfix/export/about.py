"""Facts about an exported model: its base, its repair, and the scores of exactly these weights."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import open_clip

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
    urls = [trained_on] if isinstance(trained_on, str) else list(trained_on or ())
    told = None if pretrained is None else Path(pretrained).name  # a tag, or the name of a file without its folder
    return {
        "model": facts["model"],
        "pretrained": told,
        "base_model": base_model(backbone.name, pretrained),
        "licence": licences.get(told or facts["model"]),
        **repair,
        "trained_on": [portable(url) for url in urls],
        "datasets": datasets(urls),
        "weights": weights,
        "scores": record.scores if record else None,
        "results": record.facts() if record else None,
        "exported_with": {"versions": facts["versions"], "commit": facts["commit"]},
    }


def scored(checkpoint: str | None, weights: str) -> Record | None:
    """Return the record of the checkpoint's run if it scored these very weights: last.ckpt often was not scored."""
    record = Record.of_checkpoint(checkpoint) if checkpoint else None
    return record if record and (record.weights or {}).get("after") == weights else None


def base_model(name: str, pretrained: str | None) -> str | None:
    """Return the repository of the pretrained weights on the hub, org/name; None if it is not known."""
    if name.startswith("hf-hub:"):
        source = name.removeprefix("hf-hub:")
    else:
        source = (open_clip.get_pretrained_cfg(name, pretrained or "") or {}).get("hf_hub") or ""
    return "/".join(source.split("/")[:2]) or None


def datasets(urls: Sequence[str]) -> list[str]:
    """Return the data sets of the hub, org/name, that urls of shards name."""
    found = [re.search(r"(?:huggingface\.co/|hf://)datasets/([\w.-]+/[\w.-]+)", url) for url in urls]
    return list(dict.fromkeys(match[1] for match in found if match))


def portable(url: str) -> str:
    """Return a url unchanged, and only the last two parts of a path."""
    return url if "://" in url else "/".join(Path(url).parts[-2:])
