"""One sample: undecoded bytes in; its picture, its texts and what was stored of it out."""

import io
import json
import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as tvf

from clipfix.data.shards import expand, read_shard

log = logging.getLogger(__name__)

IMAGES = ("jpg", "jpeg", "png", "webp")
# What a file may be whatever its suffix says. Pillow knows more, and for one of them (EPS) it would start Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
LONGEST_SIDE = 20  # times the shorter one: beyond it a whole resized picture would be mostly cut away


# -- samples -----------------------------------------------------------------------------------------------------------


def encoded_image(raw: Mapping[str, Any]) -> bytes:
    """The image file of a sample."""
    data = next((raw[suffix] for suffix in IMAGES if suffix in raw), None)
    if data is None:
        raise ValueError(f"no image ({', '.join(IMAGES)})")
    return data


def fingerprint(raw: Mapping[str, Any]) -> str:
    """Of the image file: it tells whether that was changed after something was stored of it."""
    return blake2b(encoded_image(raw), digest_size=16).hexdigest()


def decode(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Image (RGB), txt and json of one sample; raises on anything broken.

    Of an animation the first frame. EXIF's orientation is left alone, as CLIP's and open_clip's own loaders leave it:
    a turned picture would be another one than those that the published weights were trained and scored on.
    """
    data = encoded_image(raw)
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
    if image.mode.startswith("I"):  # 16 bits, of which Pillow would clip all that is above 255 to white
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    image = image.convert("RGB")
    record = json.loads(raw.get("json", b"{}"))
    if not isinstance(record, dict):
        raise ValueError("its json is not an object")
    return {"key": raw["__key__"], "image": image, "txt": raw.get("txt", b"").decode().strip(), "json": record}


def samples(urls: str | Iterable[str], allow_pipe: bool = False) -> Iterator[dict[str, Any]]:
    """One decoded pass in stored order: {key, image (PIL), txt, json}; for benchmarks and looking around."""
    return readable(undecoded(urls, allow_pipe))


def undecoded(urls: str | Iterable[str], allow_pipe: bool = False) -> Iterator[dict[str, Any]]:
    """One pass in stored order, as the samples lie in their shards: bytes by suffix."""
    for url in expand(urls, allow_pipe):
        yield from read_shard(url)


def readable(raws: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """The samples that can be decoded; of each other one, a line in the log."""
    for raw in raws:
        try:
            sample = decode(raw)
        except Exception as error:
            log.warning("%s in %s is broken (%s): skipped", raw["__key__"], raw["__url__"], error)
            continue
        yield sample


# -- pictures ----------------------------------------------------------------------------------------------------------


def square(image: Image.Image, size: int) -> Float[Tensor, "3 size size"]:
    """Shorter side to `size` (bicubic), centre crop, [0, 1]: what open_clip does before its mean and std."""
    return tvf.to_tensor(cropped(image, size))


def cropped(image: Image.Image, size: int) -> Image.Image:
    """The picture that `square` gives, in bytes."""
    if max(image.size) > LONGEST_SIDE * min(image.size):  # the same, without what 20,000 x 1 would be as a whole
        side, left, top = min(image.size), (image.width - min(image.size)) / 2, (image.height - min(image.size)) / 2
        box = (left, top, left + side, top + side)
        return image.resize((size, size), Image.Resampling.BICUBIC, box)
    if image.width > image.height:
        # Pillow resizes along rows, rounds to bytes, then along columns: cut in between, the second half has less to do
        # and the pixels are the same. Its own `box` would save more, but rounds where it begins to 32 bits.
        width = int(size * image.width / image.height)
        left = round((width - size) / 2)
        rows = image.resize((width, image.height), Image.Resampling.BICUBIC)
        return rows.crop((left, 0, left + size, image.height)).resize((size, size), Image.Resampling.BICUBIC)
    return tvf.center_crop(tvf.resize(image, size, InterpolationMode.BICUBIC), size)


def in_unit_range(images: UInt8[Tensor, "b 3 s s"]) -> Float[Tensor, "b 3 s s"]:
    """Bytes as [0, 1], on the device where they lie; the numbers of `square`."""
    return images.float().div_(torch.full((), 255.0, device=images.device))  # by a number, CUDA would round otherwise
