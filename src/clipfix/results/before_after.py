"""The scores that a run reports: of its backbone before any step, and with the repair that it chose."""

import copy
from collections.abc import Mapping
from typing import Any

import lightning as L

from clipfix.evals.base import Benchmark, Scores, evaluate
from clipfix.evals.features import TextCache
from clipfix.models.clip import Backbone, weights_hash
from clipfix.results import provenance


class BeforeAfter(L.Callback):
    """Scores a copy of the backbone before training, and whenever `score` is called; all ranks share the work.

    The copy is `self.backbone`: a method may rebuild its own (Long-CLIP, LoRA). It is kept in main memory between the
    scorings.
    """

    def __init__(self, backbone: Backbone, benchmarks: Mapping[str, Benchmark]) -> None:
        self.backbone, self.benchmarks = copy.deepcopy(backbone), benchmarks
        self.scored: dict[str, dict[str, Scores]] = {}  # {"before" or "after": {benchmark: scores}}
        self.weights: dict[str, str] = {}  # their hashes
        self.facts: dict[str, Any] = {}  # as provenance.facts returns them, on the first rank
        self.texts: TextCache = {}  # most repairs leave the text tower as it is

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Score before training: not earlier, because all ranks share the work and only now they have started."""
        self.score("before", trainer)

    def score(self, when: str, trainer: L.Trainer) -> None:
        """Add `scored[when]`."""
        self.backbone.to(trainer.strategy.root_device)
        self.scored[when] = evaluate(self.backbone, self.benchmarks, self.texts)
        if trainer.is_global_zero:
            self.weights[when] = weights_hash(self.backbone.model)
            self.facts = self.facts or provenance.facts(self.backbone, self.benchmarks)
        self.backbone.to("cpu")  # training needs the memory
