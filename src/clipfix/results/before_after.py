"""The scores that a run reports: of its backbone before any step, and with the repair that it chose."""

from collections.abc import Mapping
from typing import Any

import lightning as L

from clipfix.evals.base import Benchmark, Scores, evaluate
from clipfix.evals.features import TextCache
from clipfix.models.base import Model
from clipfix.models.clip import weights_hash
from clipfix.results import provenance


class BeforeAfter(L.Callback):
    """Scores a model before training, and whenever `score` is called; all ranks share the work.

    Args:
        model: what the method's `wrap` returned for a copy of the pretrained backbone. It is kept in main memory
            between the scorings.
    """

    def __init__(self, model: Model, benchmarks: Mapping[str, Benchmark]) -> None:
        self.model, self.benchmarks = model, benchmarks
        self.scored: dict[str, dict[str, Scores]] = {}  # {"before" or "after": {benchmark: scores}}
        self.weights: dict[str, str] = {}  # their hashes
        self.facts: dict[str, Any] = {}  # as provenance.facts returns them, on the first rank
        self.texts: TextCache = {}  # most repairs leave the text tower as it is

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Score before training: not earlier, because all ranks share the work and only now they have started."""
        self.score("before", trainer)

    def score(self, when: str, trainer: L.Trainer) -> None:
        """Add `scored[when]`."""
        self.model.to(trainer.strategy.root_device)
        self.scored[when] = evaluate(self.model, self.benchmarks, self.texts)
        if trainer.is_global_zero:
            self.weights[when] = weights_hash(self.model.weights)
            self.facts = self.facts or provenance.facts(self.model.backbone, self.benchmarks)
        self.model.to("cpu")  # training needs the memory
