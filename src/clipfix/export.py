"""A trained backbone as files that others load. So far one format: open_clip's folder."""

import lightning as L

from clipfix.backbone import Backbone


class SaveFolder(L.Callback):
    """Writes the backbone as an open_clip folder when training ends: `backbone.name=<folder>` loads it."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module.backbone, Backbone)
        if trainer.is_global_zero:
            pl_module.backbone.save(self.folder)
