"""One sample: undecoded bytes in; its picture, its texts and what was stored of it out."""

import io
import itertools
import json
import logging
import random
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, NotRequired
from urllib.parse import urlsplit

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as tvf
from typing_extensions import TypedDict

from clipfix.data.shards import expand, read_shard

log = logging.getLogger(__name__)

IMAGES = ("jpg", "jpeg", "png", "webp")
# What a file may be whatever its suffix says. Pillow knows more, and for one of them (EPS) it would start Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
LONGEST_TEXT = 20_000  # characters: no tower reads as many, and a tokenizer takes seconds for a few million
LONGEST_SIDE = 20  # times the shorter one: beyond it a whole resized picture would be mostly cut away
PICKS = ("one", "first_sentence", "other_sentences", "all", "random")


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


# -- texts -------------------------------------------------------------------------------------------------------------


class TextSettings(TypedDict):
    """What a config says of a `Text`."""

    key: str
    pick: str
    k: NotRequired[int | None]


@dataclass(frozen=True)
class Text:
    """Which text of a sample goes into the batch: `key` says where it lies, `pick` which of several, `k` how many.

    A batch is rectangular, so every sample gives exactly k texts: `all` takes them in order, `random` in an order
    drawn anew each pass, and both begin again at the first when a sample has fewer than k. `k` of None takes as many as
    there are: for benchmarks alone.
    """

    key: str
    pick: str
    k: int | None = 1

    def __post_init__(self) -> None:
        if self.pick not in PICKS:
            raise ValueError(f"data.texts: pick {self.pick!r} is none of {', '.join(PICKS)}")
        if (self.k is not None and self.k < 1) or (self.k != 1 and self.pick not in ("all", "random")):
            raise ValueError(f"data.texts: k={self.k} with pick={self.pick}: k > 1 needs pick=all or pick=random")

    @property
    def whole(self) -> bool:
        """Whether it gives texts as they lie there, so that what is stored of them can be looked up."""
        return self.pick not in ("first_sentence", "other_sentences")

    def draw(self, sample: Mapping[str, Any], rng: random.Random) -> list[str]:
        texts = strings(sample, self.key)
        if self.pick == "first_sentence":  # Source: Long-CLIP (arXiv 2403.15378), short caption of its training set
            texts = [texts[0].split(". ", 1)[0]]
        elif self.pick == "other_sentences":
            texts = [other_sentences(texts[0], rng)]
        elif self.pick == "random":
            texts = rng.sample(texts, len(texts))
        return texts if self.k is None else list(itertools.islice(itertools.cycle(texts), self.k))


def strings(sample: Mapping[str, Any], key: str) -> list[str]:
    """The texts that lie under a key of a decoded sample, one or more."""
    found = sample["txt"] if key == "txt" else sample["json"].get(key)
    several = found if isinstance(found, list) else [found] if isinstance(found, str) else []
    texts = [text.strip()[:LONGEST_TEXT] for text in several if text.strip()]
    if not texts:
        raise ValueError(f"no text under {key!r} (its json has: {', '.join(sample['json']) or 'nothing'})")
    "".join(texts).encode()  # json can hold half a surrogate pair, on which tokenizers fail
    return texts


def other_sentences(text: str, rng: random.Random) -> str:
    """Some of the sentences after the first, in any order; a text of one sentence as it is.

    Source: DeBias-CLIP (arXiv 2602.22419), its short caption: the first sentence, a summary, is left out, and the
    number of the others is uniform.
    """
    others = [sentence for sentence in text.split(". ")[1:] if sentence.strip()]
    if not others:
        return text
    return ". ".join(rng.sample(others, rng.randint(1, len(others)))).strip()


# -- what run=annotate stored beside them ------------------------------------------------------------------------------


def look_up(
    raw: Mapping[str, Any], member: str, texts: Mapping[str, Text], drawn: Mapping[str, list[str]]
) -> dict[str, Tensor]:
    """What `run=annotate annotator=features` stored: `image` [1, d], and [k, d] of drawn texts whose key it encoded."""
    if member not in raw:
        raise ValueError(f"no {member}: make it by run=annotate annotator=features, or set data.features=null")
    with np.load(io.BytesIO(raw[member]), allow_pickle=False) as stored:
        image, rows = (torch.from_numpy(stored[name]).float() for name in ("image", "text"))
        row = {text: i for i, text in enumerate(stored["strings"].tolist())}
        keys = stored["keys"].tolist()
    found = {"image": image[None]}
    for name, text in texts.items():
        if not text.whole or text.key not in keys:
            continue
        if absent := [string for string in drawn[name] if string not in row]:
            raise ValueError(f"{member} has nothing of the {name} {absent[0]!r}: annotate these shards again")
        found[name] = rows[[row[string] for string in drawn[name]]]
    return found


def look_up_latent(raw: Mapping[str, Any], member: str, of: str | None) -> Float[Tensor, "c y x"]:
    """What `run=annotate annotator=latents` stored of this very picture; `of` is what `Diffusion.latents_of` says."""
    if member not in raw:
        raise ValueError(no_latents(member))
    with np.load(io.BytesIO(raw[member]), allow_pickle=False) as stored:
        latent, found, picture = (stored[name] for name in ("latent", "of", "picture"))
    if found != of:
        raise ValueError(f"its {member} is of {found}, not of {of}")
    if picture != fingerprint(raw):
        raise ValueError(f"its picture is not the one that {member} was made of: annotate these shards again")
    return torch.from_numpy(latent).float()


def check_latents(shards: list[str], member: str, of: str | None) -> None:
    """Refuses shards without latents, or with those of another autoencoder or size, before anything is trained.

    The first sample of each local shard is asked; of others, which may take long to open, that of the first shard.
    """
    for shard in [shard for shard in shards if not urlsplit(shard).scheme] or shards[:1]:
        for raw in itertools.islice(read_shard(shard), 1):
            if member not in raw:
                raise ValueError(f"{shard} has {no_latents(member)}")
            try:
                with np.load(io.BytesIO(raw[member]), allow_pickle=False) as stored:
                    found = str(stored["of"])
            except Exception:  # damaged: training counts it with other broken samples
                continue
            if found != of:
                raise ValueError(
                    f"{shard} has latents of {found}, and this run reads those of {of}: write them by run=annotate "
                    "annotator=latents with diffusion and backbone as here, or set data.latents=null"
                )


def no_latents(member: str) -> str:
    return f"no {member}: make it by run=annotate annotator=latents, or set data.latents=null"
