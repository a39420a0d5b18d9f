"""Callbacks for DIVA: errors of the diffusion model under several conditions, and images generated from conditions."""

import copy
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from clipfix.data.decoding import samples, square
from clipfix.evals.embed import BATCH
from clipfix.evals.features import eval_mode
from clipfix.evals.plots import Cell, gallery
from clipfix.functional.anchors import feature_drift
from clipfix.methods.diva import DIVA
from clipfix.results.report import log_picture
from clipfix.training.sharding import unsharded


class Watch(L.Callback):
    """Logs the error of the diffusion model under different conditions, and the drift of the visual tower.

    `denoising/right`, `denoising/shuffled` and `denoising/null` are the errors under the condition of the image, of
    another image, and of the empty text, with the noise and timesteps of the next step. `drift/features` is 1 - cosine
    of the image features and those of the pretrained tower. The callback does not change training.

    Args:
        every_n_batches: Batches between two measurements; in between the logger repeats the last values.
    """

    def __init__(self, every_n_batches: int) -> None:
        if every_n_batches < 1:
            raise ValueError(f"callbacks.watch.every_n_batches is {every_n_batches}: set it to 1 or more.")
        self.every_n_batches = every_n_batches

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Copy the pretrained tower before weights are resumed or sharded."""
        backbone: Any = pl_module.backbone
        self.original = copy.deepcopy(backbone, {id(backbone.text): backbone.text}).requires_grad_(False)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, DIVA)
        if pl_module.batches_seen % self.every_n_batches:
            return
        self.original.to(pl_module.device).visual.eval()
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(trainer.precision_plugin.train_step_context())
            stack.enter_context(unsharded(pl_module))
            if pl_module.feedback is not None:
                pl_module.seed_draws(pl_module.batches_seen)
                for name, error in pl_module.denoising_errors(batch).items():
                    pl_module.note(f"denoising/{name}", error)
            image, original = (
                F.normalize(clip.encode_image(batch["image"]).float(), dim=-1)
                for clip in (pl_module.backbone, self.original)
            )
            pl_module.note("drift/features", feature_drift(image, original))


class Reconstructions(L.Callback):
    """Writes `reconstructions.png` to the run folder and to W&B after each validation and at the end of training.

    The rows are the first images of the selection split, images generated from their conditions before training, and
    images generated now. Images, patches and noise are the same every time, so differences between rows come from the
    trained weights. Nothing is drawn without feedback (`method.feedback=null`) or without a selection split.

    Args:
        folder: The run folder.
        shards: The selection split; None draws nothing.
        count: Number of images.
        steps: Number of DDIM steps.
        guidance: Scale of classifier-free guidance; 1 turns it off.
        allow_pipe: Whether urls may run commands.
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
        self.last_step = -1

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        with unsharded(pl_module):
            self.render(trainer, pl_module)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.render(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        with unsharded(pl_module):
            self.render(trainer, pl_module)

    def render(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw the figure on rank 0, at most once per step. It needs no collective operation."""
        assert isinstance(pl_module, DIVA)
        step = trainer.global_step
        idle = not self.shards or pl_module.feedback is None
        if idle or step == self.last_step or not trainer.is_global_zero:
            return
        self.last_step = step
        with eval_mode(pl_module):
            first = islice(samples(self.shards or (), self.allow_pipe), max(self.count, BATCH))
            pictures = torch.stack([square(sample["image"], pl_module.needs.image_size) for sample in first])
            generated, pictures = self.reconstruct(pl_module, pictures), pictures[: self.count]
            self.before = generated if self.before is None else self.before
            rows = {"image": pictures, "before": self.before} | ({f"after {step} steps": generated} if step else {})
            cells = [Cell(to_pil_image(image), title, []) for title, images in rows.items() for image in images]
            gallery(cells, across=len(pictures)).savefig(self.path, dpi=100, bbox_inches="tight")
        log_picture("reconstructions/grid", self.path, trainer.loggers)

    def reconstruct(self, method: DIVA, pictures: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 s s"]:
        """Return images generated from the conditions of the first `count` images.

        The rest of the batch only enters the batch mean, which a condition may subtract.
        """
        method.seed_draws(0)  # training is not affected, because each step seeds its own draws
        pictures = pictures.type_as(method.condition.projection.weight)
        condition = method.condition(*method.backbone.visual_tokens(pictures))[: self.count]
        noise = torch.Generator().manual_seed(0)
        return method.diffusion.sample(condition, method.condition.null, self.steps, self.guidance, noise).cpu()

    def state_dict(self) -> dict[str, Any]:
        """Return the images generated before training, which a resumed run cannot generate again."""
        return {"before": None if self.before is None else (255 * self.before).round().byte()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict["before"] is not None:
            self.before = state_dict["before"].float() / 255
