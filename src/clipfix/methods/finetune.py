"""Plain CLIP fine-tuning: the control for all repairs, and the template for a new method."""

from typing import Any, Unpack

import torch.nn.functional as F
from torch import Tensor

from clipfix.methods.base import Method
from clipfix.models.clip import Backbone
from clipfix.training.phases import Training

PARTS = ("visual", "text", "logit_scale")


class Finetune(Method):
    """Contrastive training of the parts of CLIP named in `train`; all others are frozen.

    With `train: [visual]`, it is an upper bound for methods that learn from images alone: it trains the same tower with
    supervision.

    Args:
        train: parts that train, of `visual`, `text` and `logit_scale`; with the latter also the logit bias of a model
            that has one (SigLIP).
        label_smoothing: as in `torch.nn.functional.cross_entropy`.

    Source: CLIP (arXiv 2103.00020), figure 3.
    """

    def __init__(
        self,
        backbone: Backbone,
        train: list[str],
        label_smoothing: float,
        **training: Unpack[Training],
    ):
        super().__init__(backbone, **training)
        if not train or not set(train) <= set(PARTS):
            raise ValueError(f"method.train is {list(train)}: name at least one of {', '.join(PARTS)}.")
        self.needs = self.clip_needs("caption")
        self.check_smoothing(label_smoothing)
        self.label_smoothing = label_smoothing
        backbone.requires_grad_(False)
        for part in train:
            getattr(backbone, part).requires_grad_(True)
        if backbone.logit_bias is not None:
            backbone.logit_bias.requires_grad_("logit_scale" in train)

    def loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        image = F.normalize(self.backbone.encode_image(batch["image"]).float(), dim=-1)
        text = F.normalize(self.backbone.encode_text(self.tokens(batch, "caption")).float(), dim=-1)
        return {"contrastive": self.contrast(image, text, self.label_smoothing)}
