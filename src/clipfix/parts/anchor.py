"""Anchors: losses that keep a trained visual tower near the pretrained one."""

import copy
from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from clipfix.functional.anchors import feature_drift, similarity_drift
from clipfix.models.clip import Backbone
from clipfix.training.ranks import Ranks


class Anchor(nn.Module, ABC):
    """A weighted distance between the features of the trained tower and those of a frozen copy of the pretrained one.

    Args:
        weight: factor on the loss term.
    """

    texts: tuple[str, ...] = ()  # names of the batch's texts that the distance needs

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = weight

    def attach(self, backbone: Backbone, ranks: Ranks) -> None:
        """Copy the visual tower of a frozen backbone. The text tower, which never trains, is shared."""
        self.ranks = ranks
        self.original = copy.deepcopy(backbone, {id(backbone.text): backbone.text})
        self.original.visual.eval()

    def forward(
        self,
        images: Float[Tensor, "b 3 h w"],
        features: Float[Tensor, "b d"],
        text: Float[Tensor, "b d"] | None,
        scale: Float[Tensor, ""],
    ) -> Float[Tensor, ""]:
        """Return the weighted distance between the features of the trained tower and the original ones.

        Args:
            images: the images, in [0, 1].
            features: their features from the trained tower, of unit norm.
            text: features of the batch's captions, of unit norm; None if `texts` is empty.
            scale: inverse temperature.
        """
        with torch.no_grad():
            original = F.normalize(self.original.encode_image(images).float(), dim=-1)
        return self.weight * self.distance(features, original, text, scale)

    @abstractmethod
    def distance(
        self,
        features: Float[Tensor, "b d"],
        original: Float[Tensor, "b d"],
        text: Float[Tensor, "b d"] | None,
        scale: Float[Tensor, ""],
    ) -> Float[Tensor, ""]:
        """Return the distance between features and the original ones; arguments as in `forward`."""


class FeatureAnchor(Anchor):
    """The mean of 1 - cosine between each feature and its original; see `feature_drift`."""

    def distance(
        self,
        features: Float[Tensor, "b d"],
        original: Float[Tensor, "b d"],
        text: Float[Tensor, "b d"] | None,
        scale: Float[Tensor, ""],
    ) -> Float[Tensor, ""]:
        return feature_drift(features, original)


class SimilarityAnchor(Anchor):
    """KL divergence of each image's similarities to the captions of the joined batch; see `similarity_drift`."""

    texts = ("caption",)

    def distance(
        self,
        features: Float[Tensor, "b d"],
        original: Float[Tensor, "b d"],
        text: Float[Tensor, "b d"] | None,
        scale: Float[Tensor, ""],
    ) -> Float[Tensor, ""]:
        assert text is not None
        return similarity_drift(features, original, self.ranks.gather(text), scale)
