"""WiSE: the repaired CLIP is a mean of the trained and the original weights (arXiv 2109.01903)."""

from typing import Any

import lightning as L
import torch
from torch import Tensor

from clipfix.training.sharding import like


class WiSE(L.Callback):
    """What is validated, selected, saved for others and scored is alpha * trained + (1 - alpha) * original.

    Fine-tuning forgets; between its two ends lie models that keep most of the gain and of what was known. Training
    itself goes on from the trained weights, which a checkpoint holds beside the interpolated ones. Interpolated is what
    trains of the backbone, logit scale included, and nothing else of the method. The original is the backbone as the
    method built it, before the first step: Long-CLIP's table is already stretched then.

    It works with every method, hence one key at the top of the config and a callback, no part of a method.

    Source: WiSE-FT (arXiv 2109.01903), equation 1.
    """

    def __init__(self, alpha: float) -> None:
        if not isinstance(alpha, int | float) or not 0 < alpha <= 1:
            raise ValueError(
                f"wise is {alpha}: set the share of the trained weights, above 0 and at most 1, as in wise=0.5, or "
                "null for these alone."
            )
        self.alpha = alpha
        self.original: dict[str, Tensor] = {}
        self.trained: dict[str, Tensor] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Before a checkpoint to resume is loaded and before the model moves to its device."""
        for name, parameter in pl_module.named_parameters():
            # Of LoRA's B A, whose B starts at zero, B alone is scaled: both would give the square of alpha.
            if stage == "fit" and name.startswith("backbone.") and parameter.requires_grad and ".lora_A." not in name:
                self.original[name] = parameter.detach().clone()

    def interpolated(self, name: str, trained: Tensor) -> Tensor:
        # lerp leaves a weight that did not move as it is, to the bit: the formula as written would round it.
        return torch.lerp(like(self.original[name], trained), trained, self.alpha)

    @torch.no_grad()
    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for name in self.original:
            parameter = pl_module.get_parameter(name)
            self.trained[name] = parameter.clone()
            parameter.copy_(self.interpolated(name, parameter))

    @torch.no_grad()
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """After every score; before ModelCheckpoint, which Lightning calls last."""
        for name in self.original:
            pl_module.get_parameter(name).copy_(self.trained.pop(name))

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Lightning asks callbacks before the method, which merges adapters and keeps what trains."""
        checkpoint["training"] = dict(checkpoint["state_dict"])
        for name in self.original:
            checkpoint["state_dict"][name] = self.interpolated(name, checkpoint["state_dict"][name])
