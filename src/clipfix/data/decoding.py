"""Decoding of samples: from the bytes of a shard to a picture, its texts and its json."""

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
# Accepted file formats, whatever the suffix is. Pillow reads others too, and for EPS it would start Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
LONGEST_SIDE = 20  # times the shorter side; the resized picture of a longer one would be mostly cropped away


# -- samples -----------------------------------------------------------------------------------------------------------


def encoded_image(raw: Mapping[str, Any]) -> bytes:
    """Return the bytes of the image file of a sample; raise ValueError if it has none."""
    data = next((raw[suffix] for suffix in IMAGES if suffix in raw), None)
    if data is None:
        raise ValueError(f"no image ({', '.join(IMAGES)})")
    return data


def fingerprint(raw: Mapping[str, Any]) -> str:
    """Return a hash of the image file, by which stored features and latents are checked against their picture."""
    return blake2b(encoded_image(raw), digest_size=16).hexdigest()


def decode(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Decode a sample to {key, image (PIL, RGB), txt, json}; broken bytes raise various exceptions.

    An animation gives its first frame. The EXIF orientation is ignored, because the loaders of CLIP and open_clip
    ignore it, and the published weights were trained and scored on such pictures.
    """
    data = encoded_image(raw)
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
    if image.mode.startswith("I"):  # 16 bits; Pillow would clip all values above 255 to white
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    image = image.convert("RGB")
    record = json.loads(raw.get("json", b"{}"))
    if not isinstance(record, dict):
        raise ValueError("its json is not an object")
    return {"key": raw["__key__"], "image": image, "txt": raw.get("txt", b"").decode().strip(), "json": record}


def samples(urls: str | Iterable[str], allow_pipe: bool = False) -> Iterator[dict[str, Any]]:
    """Yield decoded samples, {key, image (PIL), txt, json}, in stored order, once."""
    return readable(undecoded(urls, allow_pipe))


def undecoded(urls: str | Iterable[str], allow_pipe: bool = False) -> Iterator[dict[str, Any]]:
    """Yield undecoded samples, which are bytes by file suffix, in stored order, once."""
    for url in expand(urls, allow_pipe):
        yield from read_shard(url)


def readable(raws: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield the decoded samples; log a warning for each broken one and skip it."""
    for raw in raws:
        try:
            sample = decode(raw)
        except Exception as error:
            log.warning("%s in %s is broken (%s): skipped", raw["__key__"], raw["__url__"], error)
            continue
        yield sample


# -- pictures ----------------------------------------------------------------------------------------------------------


def square(image: Image.Image, size: int) -> Float[Tensor, "3 size size"]:
    """Resize the shorter side to `size` pixels (bicubic), crop the centre, scale to [0, 1].

    This is the preprocessing of open_clip before it subtracts the mean.
    """
    return tvf.to_tensor(cropped(image, size))


def cropped(image: Image.Image, size: int) -> Image.Image:
    """Return the picture of `square` as a PIL image of 8 bits."""
    if max(image.size) > LONGEST_SIDE * min(image.size):  # crop first: 20,000 x 1 pixels resized would be huge
        side, left, top = min(image.size), (image.width - min(image.size)) / 2, (image.height - min(image.size)) / 2
        box = (left, top, left + side, top + side)
        return image.resize((size, size), Image.Resampling.BICUBIC, box)
    if image.width > image.height:
        # Pillow resizes along rows, rounds to bytes, then resizes along columns. Cropping in between gives the same
        # pixels and saves work. Pillow's `box` would save more, but it rounds the start of the box to 32 bits.
        width = int(size * image.width / image.height)
        left = round((width - size) / 2)
        rows = image.resize((width, image.height), Image.Resampling.BICUBIC)
        return rows.crop((left, 0, left + size, image.height)).resize((size, size), Image.Resampling.BICUBIC)
    return tvf.center_crop(tvf.resize(image, size, InterpolationMode.BICUBIC), size)


def in_unit_range(images: UInt8[Tensor, "b 3 s s"]) -> Float[Tensor, "b 3 s s"]:
    """Return images of bytes as floats in [0, 1], bit-identical to `square`, on their device."""
    # Division by a tensor: CUDA rounds division by a Python number differently.
    return images.float().div_(torch.full((), 255.0, device=images.device))
