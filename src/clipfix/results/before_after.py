"""The scores that a run reports: of its backbone before any step, and with the repair that it chose."""

import copy
from collections.abc import Mapping
from typing import Any

import lightning as L

from clipfix.evals.base import Benchmark, evaluate
from clipfix.evals.features import TextCache
from clipfix.models.clip import Backbone, weights_hash
from clipfix.results import provenance


class BeforeAfter(L.Callback):
    """Scores a copy of the backbone before training, and whenever `rate` is called; all ranks share the work.

    A copy, `backbone`, because a method may rebuild its own (Long-CLIP, LoRA); it rests in main memory in between.
    """

    def __init__(self, backbone: Backbone, benchmarks: Mapping[str, Benchmark]) -> None:
        self.backbone, self.benchmarks = copy.deepcopy(backbone), benchmarks
        self.scores: dict[str, dict[str, float]] = {}
        self.weights: dict[str, str] = {}  # their hashes
        self.facts: dict[str, Any] = {}  # of provenance.py, on the first rank
        self.texts: TextCache = {}  # most repairs leave the text tower as it is

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """A callback's turn, as only now all ranks are there."""
        self.rate("before", trainer)

    def rate(self, when: str, trainer: L.Trainer) -> None:
        """Adds `scores[when]`."""
        self.backbone.to(trainer.strategy.root_device)
        self.scores[when] = evaluate(self.backbone, self.benchmarks, self.texts)
        if trainer.is_global_zero:
            self.weights[when] = weights_hash(self.backbone.model)
            self.facts = self.facts or provenance.facts(self.backbone, self.benchmarks)
        self.backbone.to("cpu")  # training wants the memory
