"""Images that a diffusion model generates from texts during training."""

from pathlib import Path
from typing import Any

import lightning as L
import torch
from torchvision.transforms.functional import to_pil_image

from clipfix.evals.plots import Cell, gallery
from clipfix.methods.denoise import Denoise, join_captions
from clipfix.results.report import log_picture


class Samples(L.Callback):
    """Writes `samples.png` to the run folder and to W&B at each validation.

    It shows the first images of the validation split, and beside each the image generated from its text. The noise is
    the same every time.

    Args:
        folder: The run folder.
        count: Number of texts.
        steps: Number of DDIM steps.
        guidance: Scale of classifier-free guidance; 1 turns it off.
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
        condition, null = pl_module.diffusion.condition(texts), pl_module.diffusion.condition([""])[0]
        generated = pl_module.diffusion.sample(condition, null, self.steps, self.guidance, noise)
        cells = []
        for text, picture, image in zip(texts, batch["image"], generated, strict=False):
            cells.append(Cell(to_pil_image(picture), "validation image", [(text, None)]))
            cells.append(Cell(to_pil_image(image), "generated from its text", []))
        gallery(cells, across=8, characters=34).savefig(self.path, dpi=100, bbox_inches="tight")
        log_picture("samples/grid", self.path, trainer.loggers)
