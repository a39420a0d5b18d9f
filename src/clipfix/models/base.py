"""What benchmarks may ask of a model: a pair of towers, and capabilities that only some models have."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor, nn


class Model(nn.Module, ABC):
    """A pair of towers in one joint space: what every benchmark and every method can rely on."""

    backbone: Any  # the Backbone inside; of a Backbone, itself

    @property
    def weights(self) -> nn.Module:
        """The module whose weights identify this model: their hash is stored with its scores."""
        return self

    @property
    @abstractmethod
    def image_size(self) -> int:
        """Side in pixels of the square images that the visual tower reads."""

    @property
    @abstractmethod
    def context_length(self) -> int:
        """Number of tokens that the text tower reads, start and end token included."""

    @property
    @abstractmethod
    def text(self) -> nn.Module:
        """The text tower. Features of texts are kept as long as its weights do not change."""

    @abstractmethod
    def encode_image(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        """Return features of images in [0, 1], not normalized."""

    @abstractmethod
    def encode_text(self, tokens: Int[Tensor, "b l"]) -> Float[Tensor, "b d"]:
        """Return features of token ids, not normalized."""

    @abstractmethod
    def tokenize(self, texts: list[str], at_most: int | None = None) -> Int[Tensor, "b l"]:
        """Return token ids on the model's device, at most `at_most` of each text."""

    @abstractmethod
    def load_trained(self, state: Mapping[str, Tensor]) -> None:
        """Load what a method trained, under the names of the method's checkpoint.

        Raises:
            ValueError: if the weights do not fit this model.
        """


class Wrapper(Model):
    """A model around a backbone, with state of its own: a few-shot head, for example.

    A method that has one calls it `model`, so that its state is in the checkpoint as `model.<name>`, beside
    `backbone.<name>`. A subclass adds state, and overrides what it computes in another way.
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
        own = {name.removeprefix("model."): value for name, value in state.items() if name.startswith("model.")}
        there = self.state_dict()
        for name, value in own.items():
            if name not in there or there[name].shape != value.shape:
                raise ValueError(f"model.{name} of the checkpoint does not fit this model.")
        self.load_state_dict(own, strict=False)


# -- capabilities: a benchmark that needs one checks for it and refuses other models in one line ----------------------


@runtime_checkable
class Patches(Protocol):
    """A model with patch tokens in the joint space."""

    def visual_tokens(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the image features [b, d] and the patches beside them [b, n, d]."""
        ...


@runtime_checkable
class Classifier(Protocol):
    """A model with a classifier of its own over image features."""

    def class_logits(self, features: Tensor, classes: Sequence[str]) -> Tensor:
        """Return logits [b, c] of unit-norm image features [b, d], for classes by name."""
        ...


@runtime_checkable
class FewShot(Protocol):
    """A model that classifies queries from a few labelled examples."""

    def episode_logits(self, support: Tensor, labels: Tensor, queries: Tensor) -> Tensor:
        """Return logits [q, ways] of query images, given support images [s, ...] and their labels [s]."""
        ...
