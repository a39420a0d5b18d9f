"""The interface of a model: a pair of towers, and capabilities that only some models have."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor, nn


class Model(nn.Module, ABC):
    """A pair of towers with one joint space. All benchmarks and methods use this interface."""

    backbone: Any  # the wrapped Backbone; a Backbone itself for a Backbone

    @property
    def weights(self) -> nn.Module:
        """The module whose weights identify this model. Their hash is stored with its scores."""
        return self

    @property
    @abstractmethod
    def image_size(self) -> int:
        """Side of the square input images of the visual tower, in pixels."""

    @property
    @abstractmethod
    def context_length(self) -> int:
        """Number of tokens of a text, including the start and end tokens."""

    @property
    @abstractmethod
    def text(self) -> nn.Module:
        """The text tower. Text features are cached as long as its weights do not change."""

    @abstractmethod
    def encode_image(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        """Return features of images in [0, 1], not normalized."""

    @abstractmethod
    def encode_text(self, tokens: Int[Tensor, "b l"]) -> Float[Tensor, "b d"]:
        """Return features of token ids, not normalized."""

    @abstractmethod
    def tokenize(self, texts: list[str], at_most: int | None = None) -> Int[Tensor, "b l"]:
        """Return token ids on the model's device, cut to `at_most` tokens for each text."""

    @abstractmethod
    def load_trained(self, state: Mapping[str, Tensor]) -> None:
        """Load the weights that a method trained, by their names in its checkpoint.

        Raises:
            ValueError: if the weights do not fit this model.
        """


class Wrapper(Model):
    """A model that adds state, such as a few-shot head, to a backbone.

    A method keeps it in the attribute `model`, so that the checkpoint has its state as `model.<name>`, beside
    `backbone.<name>`. Subclasses add state and override the methods that they compute differently.
    """

    def __init__(self, backbone: Any) -> None:
        super().__init__()
        self.backbone = backbone

    @property
    def image_size(self) -> int:
        return self.backbone.image_size

    @property
    def context_length(self) -> int:
        return self.backbone.context_length

    @property
    def text(self) -> nn.Module:
        return self.backbone.text

    def encode_image(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        return self.backbone.encode_image(images)

    def encode_text(self, tokens: Int[Tensor, "b l"]) -> Float[Tensor, "b d"]:
        return self.backbone.encode_text(tokens)

    def tokenize(self, texts: list[str], at_most: int | None = None) -> Int[Tensor, "b l"]:
        return self.backbone.tokenize(texts, at_most)

    def load_trained(self, state: Mapping[str, Tensor]) -> None:
        self.backbone.load_trained(state)
        added = {name.removeprefix("model."): value for name, value in state.items() if name.startswith("model.")}
        expected = self.state_dict()
        for name, value in added.items():
            if name not in expected or expected[name].shape != value.shape:
                raise ValueError(f"model.{name} of the checkpoint does not fit this model.")
        self.load_state_dict(added, strict=False)


# -- capabilities: a benchmark that needs one checks for it, and raises a one-line error for other models --------------


@runtime_checkable
class Patches(Protocol):
    """A model with patch tokens in the joint space."""

    def visual_tokens(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the image features [b, d] and those of the patches [b, n, d]."""
        ...


@runtime_checkable
class Classifier(Protocol):
    """A model with a classifier for image features."""

    def class_logits(self, features: Tensor, classes: Sequence[str]) -> Tensor:
        """Return logits [b, c] of image features [b, d] of unit norm, for classes given by name."""
        ...


@runtime_checkable
class FewShot(Protocol):
    """A model that classifies queries from a few labelled examples."""

    def episode_logits(self, support: Tensor, labels: Tensor, queries: Tensor) -> Tensor:
        """Return logits [q, ways] of query images, given support images [s, ...] and their labels [s]."""
        ...
