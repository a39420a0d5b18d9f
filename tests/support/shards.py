"""Small shards for tests: numbered pictures whose colour is their number, and photographs as img2dataset packs them."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def encoded(image: np.ndarray | Image.Image, suffix: str = "png") -> bytes:
    """Return the bytes of an image file."""
    buffer = io.BytesIO()
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    image.save(buffer, {"jpg": "JPEG"}.get(suffix, suffix.upper()), quality=95)
    return buffer.getvalue()


def picture(number: int, height: int = 16, width: int = 16) -> np.ndarray:
    """Return a picture of one colour, which depends on its number."""
    return np.full((height, width, 3), (number % 256, number // 256, 128), np.uint8)


def pack(path: Path, samples: dict[str, dict[str, Any]]) -> Path:
    """Write one shard from {key: {suffix: bytes, str or json object}}."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, members in samples.items():
            for suffix, value in members.items():
                data = value if isinstance(value, bytes) else value.encode() if isinstance(value, str) else None
                data = json.dumps(value).encode() if data is None else data
                header = tarfile.TarInfo(f"{key}.{suffix}")
                header.size = len(data)
                tar.addfile(header, io.BytesIO(data))
    return path


def numbered(folder: Path, counts: list[int]) -> list[str]:
    """Write shards with these numbers of samples, and return all keys in stored order."""
    keys = [f"{number:05d}" for number in range(sum(counts))]
    rest = iter(keys)
    for shard, count in enumerate(counts):
        members = {}
        for key in (next(rest) for _ in range(count)):
            captions = [f"caption {place} of {key}" for place in range(5)]
            record = {
                "caption": f"picture {key}",
                "long": f"Picture {key}. It is plain. No dots.",
                "captions": captions,
            }
            members[key] = {"png": encoded(picture(int(key))), "txt": f"picture {key}", "json": record}
        pack(folder / f"{shard:05d}.tar", members)
    return keys


def photographs(folder: Path, suffix: str = "jpg") -> list[str]:
    """Write the photographs of scikit-image and scikit-learn in the layout of img2dataset, and return their keys."""
    from skimage import data
    from sklearn.datasets import load_sample_images

    china, flower = load_sample_images().images
    photos = {
        "an astronaut in front of a flag": data.astronaut(),
        "a cup of coffee on a wooden table": data.coffee(),
        "the face of a tabby cat": data.chelsea(),
        "a rocket on its launch pad": data.rocket(),
        "a temple in China": china,
        "a flower in bloom": flower,
    }
    members: dict[str, dict[str, Any]] = {}
    for number, (caption, pixels) in enumerate(photos.items()):
        image = Image.fromarray(pixels)
        image.thumbnail((256, 256))
        record = {
            "caption": caption,
            "url": f"https://example.org/{number}.jpg",
            "key": f"{number:09d}",
            "status": "success",
            "error_message": None,
            "width": image.width,
            "height": image.height,
        }
        members[record["key"]] = {suffix: encoded(image, suffix), "json": record, "txt": caption}
    keys = list(members)
    half = len(keys) // 2
    for shard, part in enumerate((keys[:half], keys[half:])):
        pack(folder / f"{shard:05d}.tar", {key: members[key] for key in part})
        (folder / f"{shard:05d}_stats.json").write_text(json.dumps({"count": len(part), "successes": len(part)}))
        (folder / f"{shard:05d}.parquet").write_bytes(b"PAR1")
    return keys
