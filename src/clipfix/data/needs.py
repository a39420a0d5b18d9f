"""What a batch must carry for a method: the method declares it, the data module reads it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

# From the collated texts of a batch to further entries of it, token ids above all.
Encode = Callable[[Mapping[str, Any]], Mapping[str, Any]]


@dataclass(frozen=True)
class Needs:
    """What a method reads from a batch. Checked once, before anything is scored or trained.

    Args:
        image_size: side of the square images in pixels.
        texts: names in `data.texts`.
        encode: functions that the loader's workers call on each collated batch; what they return joins the batch.
            Tokenizing 2,048 long captions takes a second, for which the device would otherwise wait in every step.
        features: whether `batch["features"]`, stored by `run=annotate annotator=features`, is needed.
        latents: returns what stored latents must be of (`Diffusion.latents_of`); None if the method reads none. A
            function, because the answer hashes every weight of an autoencoder.
    """

    image_size: int
    texts: tuple[str, ...] = ()
    encode: tuple[Encode, ...] = ()
    features: bool = False
    latents: Callable[[], str] | None = None
