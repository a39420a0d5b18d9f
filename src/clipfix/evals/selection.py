"""The score that chooses the checkpoint, taken on a split that is neither trained on nor reported."""

import lightning as L

from clipfix.backbone import Backbone
from clipfix.evals import Benchmark


class Selection(L.Callback):
    """Logs `selection/<metric>` of the module's backbone after each validation, for ModelCheckpoint to monitor."""

    def __init__(self, benchmark: Benchmark, metric: str) -> None:
        self.benchmark, self.metric = benchmark, metric

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        backbone = pl_module.backbone
        assert isinstance(backbone, Backbone)
        scores = self.benchmark(backbone)
        if self.metric not in scores:
            raise ValueError(f"eval.selection_metric={self.metric} is not scored: choose from {', '.join(scores)}.")
        # Every rank scores the same weights on the same pictures: the mean over ranks is the number itself.
        pl_module.log(f"selection/{self.metric}", scores[self.metric], prog_bar=True, sync_dist=True)
