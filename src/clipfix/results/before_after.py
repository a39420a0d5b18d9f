"""The scores that a run reports: before training, and with the selected checkpoint."""

from collections.abc import Mapping
from typing import Any

import lightning as L

from clipfix.evals.base import Benchmark, Scores, evaluate
from clipfix.evals.features import TextCache
from clipfix.models.base import Model
from clipfix.models.clip import weights_hash
from clipfix.results import provenance


class BeforeAfter(L.Callback):
    """Scores a model before training, and when `score` is called. All ranks share the work.

    Args:
        model: The result of the method's `wrap` for a copy of the pretrained backbone. Between scorings it is in main
            memory.
        benchmarks: The benchmarks by name.
    """

    def __init__(self, model: Model, benchmarks: Mapping[str, Benchmark]) -> None:
        self.model, self.benchmarks = model, benchmarks
        self.scored: dict[
            str, dict[str, Scores]
        ] = {}  # {column: {benchmark: scores}}; columns are "before" and "after"
        self.weights: dict[str, str] = {}  # {column: hash of the weights}
        self.facts: dict[str, Any] = {}  # result of provenance.facts, on rank 0
        self.texts: TextCache = {}  # shared, because most methods do not change the text tower

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Score before training. It is the first hook at which all ranks have started."""
        self.score("before", trainer)

    def score(self, when: str, trainer: L.Trainer) -> None:
        """Score the model and add the result to `scored`, under the column `when`."""
        self.model.to(trainer.strategy.root_device)
        self.scored[when] = evaluate(self.model, self.benchmarks, self.texts)
        if trainer.is_global_zero:
            self.weights[when] = weights_hash(self.model.weights)
            self.facts = self.facts or provenance.facts(self.model.backbone, self.benchmarks)
        self.model.to("cpu")  # training needs the memory
