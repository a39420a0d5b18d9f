"""What a generator draws from texts as it trains."""

from pathlib import Path
from typing import Any

import lightning as L
import torch
from torchvision.transforms.functional import to_pil_image

from clipfix.evals.plots import Cell, gallery
from clipfix.methods.denoise import Denoise, join_captions
from clipfix.results.report import show


class Samples(L.Callback):
    """At each validation `samples.png` in the run folder, and W&B: pictures drawn from the texts of unseen ones.

    The first texts of the validation split, unpicked, each beside the picture it describes; the same noise every time.
    """

    def __init__(self, folder: str, count: int, steps: int, guidance: float) -> None:
        self.path = Path(folder) / "samples.png"
        self.count, self.steps, self.guidance = count, steps, guidance

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if batch_idx > 0 or not trainer.is_global_zero:
            return
        assert isinstance(pl_module, Denoise)
        texts = join_captions(batch)[: self.count]
        noise = torch.Generator().manual_seed(0)
        with torch.compiler.set_stance("force_eager"):  # another number of pictures would be compiled anew
            told, null = pl_module.diffusion.condition(texts), pl_module.diffusion.condition([""])[0]
            drawn = pl_module.diffusion.sample(told, null, self.steps, self.guidance, noise)
        cells = []
        for text, picture, image in zip(texts, batch["image"], drawn, strict=False):
            cells.append(Cell(to_pil_image(picture), "test picture", [(text, None)]))
            cells.append(Cell(to_pil_image(image), "drawn from its text", []))
        gallery(cells, across=8, characters=34).savefig(self.path, dpi=100, bbox_inches="tight")
        show("samples/grid", self.path, trainer.loggers)
