"""The contents of a batch that a method requires. The method declares them and the data module provides them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

# Returns further entries of a batch, such as token ids, from its collated texts.
Encode = Callable[[Mapping[str, Any]], Mapping[str, Any]]


@dataclass(frozen=True)
class Needs:
    """The entries that a method reads from a batch. They are checked before anything is scored or trained.

    Args:
        image_size: side of the square images in pixels.
        texts: names in `data.texts`.
        encode: functions that the loader's workers call on each collated batch; the entries that they return are added
            to the batch. Tokenizing 2,048 long captions takes a second, during which the device would have to wait.
        features: True if batches must contain features that `run=annotate annotator=features` stored.
        latents: returns the identity of the autoencoder of stored latents (`Diffusion.latents_of`); None if the method
            reads no latents. This is a function because it hashes every weight of an autoencoder.
    """

    image_size: int
    texts: tuple[str, ...] = ()
    encode: tuple[Encode, ...] = ()
    features: bool = False
    latents: Callable[[], str] | None = None
