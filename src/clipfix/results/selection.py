"""Scores taken as it trains, on a split that is neither trained on nor reported; one of them chooses the checkpoint."""

from collections.abc import Mapping

import lightning as L

from clipfix.evals.base import Benchmark
from clipfix.evals.features import scoring
from clipfix.models.base import Model
from clipfix.training.sharding import unsharded


class Selection(L.Callback):
    """Logs `selection/<benchmark>/<metric>` of the method's model before training and after each validation.

    The mean of a benchmark that has one, else every metric; and `metric` (as in `pairs/mean`), which ModelCheckpoint
    monitors. Shards that several benchmarks share are embedded once a check.
    """

    def __init__(self, benchmarks: Mapping[str, Benchmark], metric: str) -> None:
        self.benchmarks, self.metric = benchmarks, metric

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Where the curves begin; a metric that nobody scores is refused here, not after the first validation."""
        if trainer.global_step == 0:
            with unsharded(pl_module):
                scores = self.score(pl_module)
            for logger in trainer.loggers:
                logger.log_metrics(scores, step=0)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        scores = self.score(pl_module)
        # Every rank scores the same weights on the same pictures: the mean over ranks is the number itself.
        for name, score in scores.items():
            pl_module.log(name, score, prog_bar=name == f"selection/{self.metric}", sync_dist=True)

    def score(self, pl_module: L.LightningModule) -> dict[str, float]:
        """What is logged, by its name there."""
        model = pl_module.scored
        assert isinstance(model, Model)
        with scoring(model) as features:
            scores = {name: benchmark.score(features).values for name, benchmark in self.benchmarks.items()}
        benchmark, _, metric = self.metric.partition("/")
        if metric not in scores.get(benchmark, {}):
            choices = [f"{name}/{metric}" for name, found in scores.items() for metric in found]
            raise ValueError(f"eval.selection_metric={self.metric} is not scored: choose from {', '.join(choices)}.")
        logged = {f"selection/{self.metric}": scores[benchmark][metric]}
        for name, found in scores.items():
            told = {"mean": found["mean"]} if "mean" in found else found
            logged |= {f"selection/{name}/{metric}": score for metric, score in told.items()}
        return logged
