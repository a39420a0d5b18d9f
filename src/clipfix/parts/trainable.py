"""Which weights of a visual tower train."""

from abc import ABC, abstractmethod
from typing import Any

from torch import nn

from clipfix.models.adapters import add_lora
from clipfix.models.clip import Backbone


class Trainable(ABC):
    """A choice of weights of a visual tower."""

    def wake(self, backbone: Backbone) -> None:
        """Let the chosen weights of a frozen backbone require a gradient."""
        for part in self.parts(backbone.visual):
            part.requires_grad_(True)

    @abstractmethod
    def parts(self, visual: Any) -> list[nn.Module | nn.Parameter]:
        """Return the modules and parameters that train; adapters are put into the tower first."""


class Tower(Trainable):
    """The whole visual tower."""

    def parts(self, visual: Any) -> list[nn.Module | nn.Parameter]:
        return [visual]


class Norms(Trainable):
    """Its layer norms. Source: arXiv 2312.11420, which tunes language models in this way."""

    def parts(self, visual: Any) -> list[nn.Module | nn.Parameter]:
        return [module for module in visual.modules() if isinstance(module, nn.LayerNorm)]


class LastBlocks(Trainable):
    """Its last blocks, the final norm and the projection to the joint space.

    Args:
        blocks: number of blocks.
    """

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks

    def parts(self, visual: Any) -> list[nn.Module | nn.Parameter]:
        layers = getattr(getattr(visual, "transformer", None), "resblocks", None)
        if layers is None:
            raise ValueError(
                "method.trainable of last blocks is for the vision transformers of open_clip's own "
                f"(ViT-L-14-quickgelu, ViT-H-14-quickgelu, ...), not for {type(visual).__name__}: choose "
                "trainable@method.trainable=tower, norms or lora."
            )
        if not 1 <= self.blocks <= len(layers):
            raise ValueError(
                f"method.trainable.blocks is {self.blocks}: train the last 1 to {len(layers)} blocks of this tower."
            )
        return [*layers[-self.blocks :], visual.ln_post, visual.proj]


class LoRA(Trainable):
    """Low-rank adapters beside its linear layers; see `add_lora`.

    Args:
        rank: of each adapter.
        alpha: an adapter is scaled by alpha / rank.

    Source: LoRA (arXiv 2106.09685).
    """

    def __init__(self, rank: int, alpha: int) -> None:
        if rank < 1:
            raise ValueError(f"method.trainable.rank is {rank}: set it to 1 or more.")
        if alpha <= 0:
            raise ValueError(f"method.trainable.alpha is {alpha}: set it above 0.")
        self.rank, self.alpha = rank, alpha

    def parts(self, visual: Any) -> list[nn.Module | nn.Parameter]:
        return list(add_lora(visual, self.rank, self.alpha))
