"""Pictures: what open_clip makes of them, whatever their bytes are like."""

import io
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from shards import encoded, photographs, picture
from torchvision.transforms import functional as tvf

from clipfix.data.decoding import LONGEST_SIDE, decode, in_unit_range, samples, square


@pytest.mark.parametrize("suffix", ["jpg", "jpeg", "png", "webp"])
def test_images_are_what_open_clip_makes_of_them(suffix: str, tmp_path: Path) -> None:
    photographs(tmp_path, suffix)
    oracle = open_clip.image_transform(48, is_train=False, mean=(0, 0, 0), std=(1, 1, 1))
    for sample in samples(str(tmp_path)):
        ours = square(sample["image"], 48)
        assert torch.equal(ours, oracle(sample["image"]))
        assert 0 <= ours.min() < ours.max() <= 1


def test_a_quicker_way_gives_the_same_pixels() -> None:
    """The oracle is what open_clip does, of noise, in which no rounding hides: wide, high, shrunk and enlarged."""
    rng = np.random.default_rng(0)
    for size in (1, 7, 32, 224):
        for _ in range(40):
            short = int(rng.integers(1, 120))
            width, height = rng.permutation([short, int(short * rng.uniform(1, LONGEST_SIDE))]).tolist()
            image = Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
            whole = tvf.resize(image, size, tvf.InterpolationMode.BICUBIC)
            assert torch.equal(square(image, size), tvf.to_tensor(tvf.center_crop(whole, size))), (width, height, size)


def test_bytes_become_the_floats_that_single_pictures_become() -> None:
    image = Image.fromarray(np.arange(768, dtype=np.uint16).astype(np.uint8).reshape(16, 16, 3))
    assert torch.equal(in_unit_range(tvf.pil_to_tensor(image)[None])[0], square(image, 16))


def test_images_of_the_right_size_are_untouched() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    assert torch.equal(square(Image.fromarray(pixels), 16), torch.from_numpy(pixels).permute(2, 0, 1) / 255)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK"])
def test_every_colour_mode_becomes_rgb(mode: str) -> None:
    suffix = "jpg" if mode == "CMYK" else "png"
    image = decode({"__key__": "0", suffix: encoded(Image.fromarray(picture(7)).convert(mode), suffix)})["image"]
    assert image.mode == "RGB"


def test_sixteen_bits_do_not_turn_white() -> None:
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    image = decode({"__key__": "0", "png": encoded(ramp)})["image"]
    assert (np.asarray(image) == np.arange(256).reshape(16, 16, 1)).all()


@pytest.mark.parametrize("suffix", ["png", "webp", "gif"])
def test_an_animation_gives_its_first_frame(suffix: str) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue", "lime")]
    frames[0].save(buffer := io.BytesIO(), suffix, save_all=True, append_images=frames[1:], duration=40, lossless=True)
    image = decode({"__key__": "0", {"gif": "jpg"}.get(suffix, suffix): buffer.getvalue()})["image"]
    assert image.getcolors() == [(256, (255, 0, 0))]


def test_exif_turns_no_picture() -> None:
    """As with open_clip, whose loader is Pillow's `convert("RGB")` and no more."""
    (exif := Image.Exif())[0x0112] = 6  # to be shown turned by 90 degrees
    Image.fromarray(picture(7, height=8, width=24)).save(buffer := io.BytesIO(), "JPEG", exif=exif)
    image = decode({"__key__": "0", "jpg": buffer.getvalue()})["image"]
    assert image.size == (24, 8)
    assert image.getexif()[0x0112] == 6


@pytest.mark.parametrize("suffix", ["png", "webp", "gif", "bmp"])
def test_a_picture_is_what_its_bytes_say_whatever_its_suffix(suffix: str) -> None:
    expected = np.asarray(Image.open(io.BytesIO(data := encoded(picture(7), suffix))).convert("RGB"))
    assert (np.asarray(decode({"__key__": "0", "jpg": data})["image"]) == expected).all()


def ramp(width: int, height: int) -> Image.Image:
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, (x + y) / 2], axis=2).astype(np.uint8))


@pytest.mark.parametrize(("width", "height"), [(600, 20), (601, 20), (20, 600), (20, 701)])
def test_a_strip_becomes_what_the_whole_resized_picture_shows(width: int, height: int) -> None:
    oracle = open_clip.image_transform(16, is_train=False, mean=(0, 0, 0), std=(1, 1, 1))
    image = ramp(width, height)
    torch.testing.assert_close(square(image, 16), oracle(image), atol=1.5 / 255, rtol=0)


@pytest.mark.parametrize("size", [(20_000, 1), (1, 20_000)])
def test_a_strip_of_20000_pixels_takes_no_memory(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Resized as a whole it would be 4,480,000 pixels long: 3 GB."""
    monkeypatch.setattr("torchvision.transforms.functional.resize", None)
    assert square(Image.new("RGB", size, "red"), 224).unique().tolist() == [0, 1]


def test_20000_pixels_under_the_limit_are_a_picture_like_any_other() -> None:
    stored = Image.new("1", (20_000, 1_001), 1)
    image = decode({"__key__": "0", "png": encoded(stored)})["image"]
    assert image.size == (20_000, 1_001)
    assert (square(image, 8) == 1).all()
