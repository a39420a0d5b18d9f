"""Old names of modules and classes, for configs and results that earlier versions stored."""

from collections.abc import Mapping
from typing import Any

# Old dotted name -> today's. The longest name that fits decides, so a class may move elsewhere than its module.
MOVED = {
    # 0.1, before modules were sorted into folders
    "clipfix.arguments": "clipfix.cli.arguments",
    "clipfix.attention": "clipfix.models.attention",
    "clipfix.backbone": "clipfix.models.clip",
    "clipfix.callbacks": "clipfix.training.callbacks",
    "clipfix.checkpoints": "clipfix.training.checkpoints",
    "clipfix.colours": "clipfix.evals.plots",
    "clipfix.compare": "clipfix.results.compare",
    "clipfix.convert": "clipfix.models.convert",
    "clipfix.data.ShardData": "clipfix.data.module.ShardData",
    "clipfix.data.ShardStream": "clipfix.data.stream.ShardStream",
    "clipfix.data.scenes.prepare": "clipfix.data.scenes.World",
    "clipfix.data.collate": "clipfix.data.stream.collate",
    "clipfix.decoding": "clipfix.data.decoding",
    "clipfix.decoding.Text": "clipfix.data.texts.Text",
    "clipfix.diffusion": "clipfix.models.diffusion",
    "clipfix.diffusion.PatchPCA": "clipfix.models.patch_pca.PatchPCA",
    "clipfix.evals.Benchmark": "clipfix.evals.base.Benchmark",
    "clipfix.evals.before_after": "clipfix.results.before_after",
    "clipfix.evals.evaluate": "clipfix.evals.base.evaluate",
    "clipfix.evals.gallery": "clipfix.evals.plots",
    "clipfix.evals.ranks": "clipfix.evals.ranking",
    "clipfix.evals.selection": "clipfix.results.selection",
    "clipfix.mining.promoted": "clipfix.results.pictures.fff",
    "clipfix.mining.show": "clipfix.annotate.survey_plots",
    "clipfix.mining.survey": "clipfix.annotate.survey",
    "clipfix.needs": "clipfix.data.needs",
    "clipfix.outcomes": "clipfix.evals.outcomes",
    "clipfix.packed": "clipfix.models.packed_text",
    "clipfix.precision": "clipfix.training.precision",
    "clipfix.pretrained": "clipfix.models.pretrained",
    "clipfix.provenance": "clipfix.results.provenance",
    "clipfix.ranks": "clipfix.system.ranks",
    "clipfix.recipe": "clipfix.results.identity",
    "clipfix.report": "clipfix.results.report",
    "clipfix.resolvers": "clipfix.cli.resolvers",
    "clipfix.samples.Reconstructions": "clipfix.results.pictures.diva.Reconstructions",
    "clipfix.samples.Samples": "clipfix.results.pictures.denoise.Samples",
    "clipfix.scenes": "clipfix.data.scenes",
    "clipfix.scenes.prepare": "clipfix.data.scenes.World",
    "clipfix.secrets": "clipfix.system.secrets",
    "clipfix.sets": "clipfix.data.sets",
    "clipfix.sharding": "clipfix.training.sharding",
    "clipfix.sharegpt4v": "clipfix.data.sharegpt4v",
    "clipfix.shards": "clipfix.data.shards",
    "clipfix.strategy": "clipfix.training.strategy",
    "clipfix.sweeps": "clipfix.cli.sweeps",
    "clipfix.tokenizer": "clipfix.models.tokenizer",
    "clipfix.trained": "clipfix.models.adapters",
    "clipfix.verbs": "clipfix.cli.verbs",
    "clipfix.wise": "clipfix.training.weight_averaging",
    "clipfix.workspace": "clipfix.results.workspace",
    "clipfix.writing": "clipfix.system.files",
}
# These hydra functions take a dotted name as their argument `path`.
BY_PATH = ("hydra.utils.get_object", "hydra.utils.get_class", "hydra.utils.get_method")


def current(node: Any) -> Any:
    """Return nested dicts and lists with every `_target_` under today's name; `node` itself is not changed."""
    if isinstance(node, list):
        return [current(value) for value in node]
    if not isinstance(node, Mapping):
        return node
    target = node.get("_target_")
    names = ("_target_", "path") if target in BY_PATH else ("_target_",)
    return {
        key: current_name(value) if key in names and isinstance(value, str) else current(value)
        for key, value in node.items()
    }


def current_name(name: str) -> str:
    """Return today's dotted name of a module, class or function."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        if (prefix := ".".join(parts[:end])) in MOVED:
            return ".".join([MOVED[prefix], *parts[end:]])
    return name
