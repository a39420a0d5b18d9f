"""WiSE: interpolation between the pretrained and the trained weights (arXiv 2109.01903)."""

from typing import Any

import lightning as L
import torch
from torch import Tensor

from clipfix.training.sharding import like


class WiSE(L.Callback):
    """Validates, selects, saves and scores alpha * trained + (1 - alpha) * original weights.

    Fine-tuning forgets. Models between the original and the trained weights keep most of the gain and most of the
    original abilities. Training continues from the trained weights, which a checkpoint holds beside the interpolated
    ones. All trained weights of the backbone are interpolated, the logit scale included, and no other weights of the
    method. The original weights are those that the method built before the first step; for Long-CLIP the positional
    table is already stretched then.

    This works with every method, so it is a callback with a key at the top of the config.

    Args:
        alpha: factor on the trained weights, above 0 and at most 1.

    Source: WiSE-FT (arXiv 2109.01903), equation 1.
    """

    def __init__(self, alpha: float) -> None:
        if not isinstance(alpha, int | float) or not 0 < alpha <= 1:
            raise ValueError(
                f"wise is {alpha}: set the factor on the trained weights, above 0 and at most 1, as in wise=0.5, or "
                "null for the trained weights alone."
            )
        self.alpha = alpha
        self.original: dict[str, Tensor] = {}
        self.trained: dict[str, Tensor] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Copy the original weights. No checkpoint has been loaded yet, and the model is in main memory."""
        for name, parameter in pl_module.named_parameters():
            # LoRA adds B A, and B starts at zero. Only B is scaled: scaling both would give the square of alpha.
            if stage == "fit" and name.startswith("backbone.") and parameter.requires_grad and ".lora_A." not in name:
                self.original[name] = parameter.detach().clone()

    def interpolated(self, name: str, trained: Tensor) -> Tensor:
        """Return the interpolated value of a parameter."""
        # lerp leaves an unchanged weight bit-identical; the formula as written would round it.
        return torch.lerp(like(self.original[name], trained), trained, self.alpha)

    @torch.no_grad()
    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for name in self.original:
            parameter = pl_module.get_parameter(name)
            self.trained[name] = parameter.clone()
            parameter.copy_(self.interpolated(name, parameter))

    @torch.no_grad()
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Restore the trained weights: after all scores, and before ModelCheckpoint, which Lightning calls last."""
        for name in self.original:
            pl_module.get_parameter(name).copy_(self.trained.pop(name))

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Store both; Lightning calls this before the method's hook, which merges adapters and drops frozen weights."""
        checkpoint["training"] = dict(checkpoint["state_dict"])
        for name in self.original:
            checkpoint["state_dict"][name] = self.interpolated(name, checkpoint["state_dict"][name])
