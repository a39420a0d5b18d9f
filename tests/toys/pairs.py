"""A toy method on image-text pairs: what the smallest method is."""

from typing import Any, Unpack

import torch.nn.functional as F
from torch import Tensor, nn

from clipfix.methods.base import Method
from clipfix.models.clip import Backbone
from clipfix.training.phases import Training


class Pairs(Method):
    """Trains a linear layer behind a frozen visual tower; nothing of it is scored."""

    def __init__(self, backbone: Backbone, smoothing: float, **training: Unpack[Training]) -> None:
        super().__init__(backbone, **training)
        backbone.requires_grad_(False)
        self.layer = nn.Linear(backbone.embed_dim, backbone.embed_dim, bias=False)
        nn.init.eye_(self.layer.weight)
        self.smoothing, self.needs = smoothing, self.clip_needs("caption")

    def loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        image = F.normalize(self.layer(self.backbone.encode_image(batch["image"])), dim=-1)
        text = F.normalize(self.backbone.encode_text(self.tokens(batch, "caption")), dim=-1)
        self.note("toy/norm", self.layer.weight.norm())
        return {"contrastive": self.contrast(image, text, self.smoothing)}
