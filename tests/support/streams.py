"""Streams of small shards for tests, and unusable samples."""

import io
import itertools
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from shards import encoded, picture

from clipfix.data.module import ShardData
from clipfix.data.needs import Needs
from clipfix.data.shards import expand
from clipfix.data.stream import Decoder, ShardStream, start_of_pass
from clipfix.data.texts import Text

CAPTION = {"caption": {"key": "txt", "pick": "one"}}


def shard_data(train: Any, **overrides: Any) -> ShardData:
    arguments = {"selection": None, "texts": CAPTION, "batch_size": 3, "workers": 0, "shuffle": 8, "seed": 0}
    data = ShardData(train=train, **{"needs": Needs(16), **arguments, **overrides})
    data.prepare_data()
    data.setup("fit")
    return data


def stream(folder: Path, shuffle: int = 8, seed: int = 0, endless: bool = True, **place: int) -> ShardStream:
    texts = {name: Text(**text) for name, text in CAPTION.items()}
    progress = start_of_pass(workers=place.pop("workers", 1)) if endless else None
    place = {"rank": 0, "world": 1, **place}
    return ShardStream(expand(str(folder)), Decoder(texts, 16, seed), shuffle=shuffle, progress=progress, **place)


def passes(source: ShardStream, count: int) -> list[list[str]]:
    """Return the keys of each of the first `count` passes of an endless stream."""
    taken = itertools.takewhile(lambda sample: sample["position"][1] < count, source)
    keys: list[list[str]] = [[] for _ in range(count)]
    for sample in taken:
        keys[sample["position"][1]].append(sample["key"])
    return keys


def png_header(side: int) -> bytes:
    """Return the beginning of a PNG file whose header gives this side length."""
    header = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))


def compressed_bomb(side: int = 20_000) -> bytes:
    """Return a complete black PNG: a file of 49 kB with 50 MB of bits, which would be 1.2 GB as RGB."""
    Image.new("1", (side, side)).save(buffer := io.BytesIO(), "PNG")
    return buffer.getvalue()


BROKEN: dict[str, dict[str, Any]] = {
    "no image": {"txt": "x"},
    "zero bytes": {"jpg": b"", "txt": "x"},
    "zero bytes of text": {"png": encoded(picture(0)), "txt": b""},
    "a pdf": {"jpg": b"%PDF-1.7\n" + bytes(2000), "txt": "x"},
    "postscript": {"jpg": encoded(picture(0), "eps"), "txt": "x"},  # for which Pillow would start Ghostscript
    "20,000 pixels": {"png": png_header(20_000), "txt": "x"},
    "compressed bomb": {"png": compressed_bomb(), "txt": "x"},
    "not an image": {"jpg": b"<html>404</html>", "txt": "x"},
    "cut off": {"png": encoded(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8))[:999], "txt": "x"},
    "not utf-8": {"png": encoded(picture(0)), "txt": b"\xff\xfe\x00"},
    "no text": {"png": encoded(picture(0))},
    "empty text": {"png": encoded(picture(0)), "txt": " \n"},
    "half a surrogate pair": {"png": encoded(picture(0)), "txt": "x", "json": b'{"caption": "\\ud800"}'},
    "not json": {"png": encoded(picture(0)), "txt": "x", "json": b"{"},
    "no object": {"png": encoded(picture(0)), "txt": "x", "json": b"[]"},
    "bomb": {"png": encoded(picture(0, 100, 100)), "txt": "x"},
}
