"""Choices of the weights of a visual tower that train."""

from abc import ABC, abstractmethod
from typing import Any

from torch import nn

from clipfix.models.adapters import add_lora
from clipfix.models.clip import Backbone


class Trainable(ABC):
    """A choice of weights of a visual tower."""

    def unfreeze(self, backbone: Backbone) -> None:
        """Set `requires_grad` for the chosen weights of a frozen backbone."""
        for part in self.parts(backbone.visual):
            part.requires_grad_(True)

    @abstractmethod
    def parts(self, visual: Any) -> list[nn.Module | nn.Parameter]:
        """Return the modules and parameters that train. `LoRA` first adds its adapters to the tower."""


class Tower(Trainable):
    """The whole visual tower."""

    def parts(self, visual: Any) -> list[nn.Module | nn.Parameter]:
        return [visual]


class Norms(Trainable):
    """The layer norms of the tower. Source: arXiv 2312.11420, which tunes language models in this way."""

    def parts(self, visual: Any) -> list[nn.Module | nn.Parameter]:
        return [module for module in visual.modules() if isinstance(module, nn.LayerNorm)]


class LastBlocks(Trainable):
    """The last blocks of the tower, its final norm and its projection to the joint space.

    Args:
        blocks: number of last blocks.
    """

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks

    def parts(self, visual: Any) -> list[nn.Module | nn.Parameter]:
        layers = getattr(getattr(visual, "transformer", None), "resblocks", None)
        if layers is None:
            raise ValueError(
                "method.trainable: last blocks are defined for open_clip's own vision transformers "
                f"(ViT-L-14-quickgelu, ViT-H-14-quickgelu, ...), and not for {type(visual).__name__}: choose "
                "trainable@method.trainable=tower, norms or lora."
            )
        if not 1 <= self.blocks <= len(layers):
            raise ValueError(
                f"method.trainable.blocks is {self.blocks}: set it between 1 and {len(layers)} for this tower."
            )
        return [*layers[-self.blocks :], visual.ln_post, visual.proj]


class LoRA(Trainable):
    """Low-rank adapters beside the linear layers of the tower; see `add_lora`.

    Args:
        rank: rank of each adapter.
        alpha: the output of an adapter is multiplied by alpha / rank.

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
