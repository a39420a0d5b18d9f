"""Scores during training on the selection split, by which the checkpoint is selected."""

from collections.abc import Mapping

import lightning as L

from clipfix.evals.base import Benchmark
from clipfix.evals.features import scoring
from clipfix.models.base import Model
from clipfix.training.sharding import unsharded


class Selection(L.Callback):
    """Logs `selection/<benchmark>/<metric>` of the method's model before training and after each validation.

    For each benchmark the mean is logged, or every metric if it has no mean.

    Args:
        benchmarks: Benchmarks on the selection split. Neither training nor the reported benchmarks read this split.
        metric: <benchmark>/<metric>, such as `pairs/mean`. It is logged too, and ModelCheckpoint monitors it.
    """

    def __init__(self, benchmarks: Mapping[str, Benchmark], metric: str) -> None:
        self.benchmarks, self.metric = benchmarks, metric

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the scores before training. A wrong `eval.selection_metric` is reported here, before any training."""
        if trainer.global_step == 0:
            with unsharded(pl_module):
                scores = self.score(pl_module)
            for logger in trainer.loggers:
                logger.log_metrics(scores, step=0)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        scores = self.score(pl_module)
        # All ranks have the same scores, so their mean over ranks does not change them.
        for name, score in scores.items():
            pl_module.log(name, score, prog_bar=name == f"selection/{self.metric}", sync_dist=True)

    def score(self, pl_module: L.LightningModule) -> dict[str, float]:
        """Return {logged name: percent}.

        Raises:
            ValueError: No benchmark computes `metric`.
        """
        model = pl_module.scored
        assert isinstance(model, Model)
        with scoring(model) as features:
            scores = {name: benchmark.score(features).values for name, benchmark in self.benchmarks.items()}
        benchmark, _, metric = self.metric.partition("/")
        if metric not in scores.get(benchmark, {}):
            choices = [f"{name}/{metric}" for name, values in scores.items() for metric in values]
            raise ValueError(f"eval.selection_metric={self.metric} does not exist: choose from {', '.join(choices)}.")
        logged = {f"selection/{self.metric}": scores[benchmark][metric]}
        for name, values in scores.items():
            chosen = {"mean": values["mean"]} if "mean" in values else values
            logged |= {f"selection/{name}/{metric}": score for metric, score in chosen.items()}
        return logged
