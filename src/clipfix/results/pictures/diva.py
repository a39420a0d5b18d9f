"""What the generator draws from the condition of each picture, before and after training."""

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import lightning as L
import torch
from jaxtyping import Float
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from clipfix.data.decoding import samples, square
from clipfix.evals.embed import BATCH
from clipfix.evals.features import still
from clipfix.evals.plots import Cell, gallery
from clipfix.methods.diva import DIVA
from clipfix.results.report import show
from clipfix.training.sharding import unsharded


class Reconstructions(L.Callback):
    """`reconstructions.png` in the run folder, and W&B: what the generator makes of what it is told of each picture.

    Row by row the first pictures of the selection split, unpicked; what was drawn from their conditions before
    training, when the projection was random; and what is drawn now: after each validation, and at the end. The same
    pictures, patches and noise every time, so that columns differ by the trained weights alone. Nothing is drawn where
    no condition is trained (`method.control=off`) or there is no selection split.
    """

    def __init__(
        self,
        folder: str,
        shards: str | Sequence[str] | None,
        count: int,
        steps: int,
        guidance: float,
        allow_pipe: bool = False,
    ) -> None:
        self.path = Path(folder) / "reconstructions.png"
        self.shards, self.allow_pipe = shards, allow_pipe
        self.count, self.steps, self.guidance = count, steps, guidance
        self.before: Tensor | None = None
        self.drawn_at = -1

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        with unsharded(pl_module):
            self.draw(trainer, pl_module)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.draw(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        with unsharded(pl_module):
            self.draw(trainer, pl_module)

    def draw(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The picture of this step, once, by the first rank alone: nothing is asked of others."""
        assert isinstance(pl_module, DIVA)
        step = trainer.global_step
        idle = not self.shards or pl_module.control == "off"
        if idle or step == self.drawn_at or not trainer.is_global_zero:
            return
        self.drawn_at = step
        with still(pl_module):
            kept = islice(samples(self.shards or (), self.allow_pipe), max(self.count, BATCH))
            pictures = torch.stack([square(sample["image"], pl_module.needs.image_size) for sample in kept])
            drawn, pictures = self.reconstruct(pl_module, pictures), pictures[: self.count]
            self.before = drawn if self.before is None else self.before
            rows = {"picture": pictures, "before": self.before} | ({f"after {step} steps": drawn} if step else {})
            cells = [Cell(to_pil_image(image), title, []) for title, images in rows.items() for image in images]
            gallery(cells, across=len(pictures)).savefig(self.path, dpi=100, bbox_inches="tight")
        show("reconstructions/grid", self.path, trainer.loggers)

    def reconstruct(self, method: DIVA, pictures: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 s s"]:
        """The first drawn, from noise and what the method tells of each; the others give the mean that it may take."""
        method.seed_draws(0)  # each training step seeds them anew
        condition = method.condition(*method.backbone.visual_tokens(pictures.type_as(method.visual_proj.weight)))
        condition = condition[: self.count]
        noise = torch.Generator().manual_seed(0)
        return method.diffusion.sample(condition, method.null, self.steps, self.guidance, noise).cpu()

    def state_dict(self) -> dict[str, Any]:
        """What was drawn before training: a resumed run could not draw it again."""
        return {"before": None if self.before is None else (255 * self.before).round().byte()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict["before"] is not None:
            self.before = state_dict["before"].float() / 255
