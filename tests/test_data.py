"""Shards to batches: every way to name them, every way they can break, and a stream that loses and doubles nothing."""

import functools
import http.server
import io
import itertools
import logging
import pickle
import random
import struct
import tarfile
import threading
import time
import zlib
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import lightning as L
import numpy as np
import open_clip
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from shards import encoded, numbered, pack, photographs, picture

from clipfix.data import ShardData, ShardStream, Text, beginning, decode, samples, square
from clipfix.shards import expand, read_shard
from clipfix.writing import add_sample

CAPTION = {"caption": {"key": "txt", "pick": "one"}}


def shard_data(train: Any, **overrides: Any) -> ShardData:
    arguments = {"selection": None, "texts": CAPTION, "batch_size": 3, "workers": 0, "shuffle": 8, "seed": 0}
    data = ShardData(train=train, image_size=16, **{**arguments, **overrides})
    data.prepare_data()
    data.setup("fit")
    return data


def stream(folder: Path, shuffle: int = 8, seed: int = 0, endless: bool = True, **place: int) -> ShardStream:
    texts = {name: Text(**text) for name, text in CAPTION.items()}
    progress = beginning(workers=place.pop("workers", 1)) if endless else None
    place = {"rank": 0, "world": 1, **place}
    return ShardStream(expand(str(folder)), texts, 16, seed=seed, shuffle=shuffle, progress=progress, **place)


def passes(source: ShardStream, count: int) -> list[list[str]]:
    """Keys of the first `count` passes of an endless stream."""
    taken = itertools.takewhile(lambda sample: sample["position"][1] < count, source)
    keys: list[list[str]] = [[] for _ in range(count)]
    for sample in taken:
        keys[sample["position"][1]].append(sample["key"])
    return keys


# ---------------------------------------------------------------------------------------------------------------- urls


def test_every_way_to_name_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photographs(tmp_path / "a")
    numbered(tmp_path / "b", [1, 1, 1])
    monkeypatch.chdir(tmp_path)
    a, b = [f"a/{n:05d}.tar" for n in range(2)], [f"b/{n:05d}.tar" for n in range(3)]
    assert expand("a") == a  # img2dataset's parquet and statistics stay out
    assert expand("b/*.tar") == b
    assert expand("b/{00000..00001}.tar") == b[:2]
    assert expand(["b/00002.tar", "a", "b/0000[01].tar"]) == [b[2], *a, *b[:2]]
    assert expand("{a,b}") == a + b
    assert expand("https://host/{0..1}.tar") == ["https://host/0.tar", "https://host/1.tar"]
    assert expand("pipe:cat b/{0..1}.tar", allow_pipe=True) == ["pipe:cat b/0.tar", "pipe:cat b/1.tar"]


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nowhere/*.tar", "no shard matches 'nowhere/"),
        ("empty", "no shard matches 'empty/"),
        ("b/{00000..00009}.tar", "9 of 10 shards .* first 'b/00001.tar'"),
        ("pipe:cat b/00000.tar", "data.allow_pipe=true"),
        ("s4://bucket/0.tar", "'s4://bucket/0.tar' cannot be read"),
    ],
)
def test_what_cannot_be_read_is_refused_before_training(
    url: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbered(tmp_path / "b", [1])
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        shard_data(url)


def test_s3_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(scheme: str) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec, "get_filesystem_class", missing)
    with pytest.raises(ValueError, match=r"pip install 'clipfix\[s3\]'"):
        expand("s3://bucket/{0..9}.tar")


def test_http_pipe_and_remote_filesystems_read_what_the_folder_holds(tmp_path: Path) -> None:
    keys = photographs(tmp_path)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    handler.func.log_message = lambda *_: None  # type: ignore[attr-defined]
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        over_http = list(samples(f"http://127.0.0.1:{server.server_port}/{{00000..00001}}.tar"))
        server.shutdown()
    over_pipe = list(samples(f"pipe:cat {tmp_path}/{{00000..00001}}.tar", allow_pipe=True))
    for path in sorted(tmp_path.glob("*.tar")):  # fsspec's filesystem in memory stands for its s3
        fsspec.filesystem("memory").pipe(f"/bucket/{path.name}", path.read_bytes())
    over_fsspec = list(samples("memory://bucket/{00000..00001}.tar"))
    local = list(samples(str(tmp_path)))
    assert [sample["key"] for sample in local] == keys
    assert local == over_http == over_pipe == over_fsspec


# ------------------------------------------------------------------------------------------------------------ decoding


@pytest.mark.parametrize("suffix", ["jpg", "jpeg", "png", "webp"])
def test_images_are_what_open_clip_makes_of_them(suffix: str, tmp_path: Path) -> None:
    photographs(tmp_path, suffix)
    oracle = open_clip.image_transform(48, is_train=False, mean=(0, 0, 0), std=(1, 1, 1))
    for sample in samples(str(tmp_path)):
        ours = square(sample["image"], 48)
        assert torch.equal(ours, oracle(sample["image"]))
        assert 0 <= ours.min() < ours.max() <= 1


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


SAMPLE = {
    "txt": "raw",
    "json": {"caption": " short ", "long": "One, 1.5 m. Two. Three.", "captions": ["a", "", "b", "c"], "n": 3, "d": {}},
}


@pytest.mark.parametrize(
    ("key", "pick", "k", "expected"),
    [
        ("txt", "one", 1, ["raw"]),
        ("caption", "one", 1, ["short"]),
        ("long", "first_sentence", 1, ["One, 1.5 m"]),
        ("captions", "one", 1, ["a"]),
        ("captions", "all", 3, ["a", "b", "c"]),
        ("captions", "all", 2, ["a", "b"]),
        ("captions", "all", 5, ["a", "b", "c", "a", "b"]),
        ("txt", "all", 2, ["raw", "raw"]),
    ],
)
def test_texts(key: str, pick: str, k: int, expected: list[str]) -> None:
    assert Text(key, pick, k).draw(SAMPLE, random.Random(0)) == expected


def test_random_texts_repeat_only_when_there_are_too_few() -> None:
    draws = [Text("captions", "random", 2).draw(SAMPLE, random.Random(seed)) for seed in range(300)]
    assert all(len(set(draw)) == 2 for draw in draws)
    counts = Counter(itertools.chain.from_iterable(draws))
    assert set(counts) == {"a", "b", "c"}
    assert max(counts.values()) < 1.3 * min(counts.values())
    assert Counter(Text("captions", "random", 7).draw(SAMPLE, random.Random(0))).most_common()[-1][1] == 2


LONG = {"txt": "A cat. It sits, 1.5 m up. It is grey.\nOld? Yes. The wall is red.", "json": {}}
OTHERS = ["It sits, 1.5 m up", "It is grey.\nOld? Yes", "The wall is red."]  # split where the first sentence ends


def test_other_sentences_are_some_of_those_after_the_first_in_any_order() -> None:
    draws = Counter(Text("txt", "other_sentences").draw(LONG, random.Random(seed))[0] for seed in range(3000))
    subsets = [chosen for size in (1, 2, 3) for chosen in itertools.permutations(OTHERS, size)]
    assert set(draws) == {". ".join(chosen) for chosen in subsets}  # never empty, never with the first
    for size in (1, 2, 3):  # their number is uniform
        count = sum(draws[". ".join(chosen)] for chosen in subsets if len(chosen) == size)
        assert 900 < count < 1100
    again = [Text("txt", "other_sentences").draw(LONG, random.Random(7)) for _ in range(2)]
    assert again[0] == again[1]


@pytest.mark.parametrize("text", ["Alone.", "Alone", "Alone. ", "v1.5 alone"])
def test_a_single_sentence_stands_for_the_others_it_lacks(text: str) -> None:
    (drawn,) = Text("txt", "other_sentences").draw({"txt": text, "json": {}}, random.Random(0))
    assert drawn == text.strip()


@pytest.mark.parametrize("pick", ["one", "first_sentence", "other_sentences", "all", "random"])
def test_a_huge_caption_is_cut_to_more_than_any_tower_reads(pick: str) -> None:
    (drawn,) = Text("txt", pick).draw({"txt": "cat " * 3_000_000, "json": {}}, random.Random(0))
    assert drawn == "cat " * 5_000
    start = time.perf_counter()
    tokens = open_clip.get_tokenizer("ViT-B-32")([drawn], 477)
    assert time.perf_counter() - start < 1  # of the whole it would be ten
    assert tokens.count_nonzero() == 477


@pytest.mark.parametrize("key", ["absent", "n", "d"])
def test_a_sample_without_the_text_is_broken(key: str) -> None:
    with pytest.raises(ValueError, match=f"no text under '{key}'"):
        Text(key, "one").draw(SAMPLE, random.Random(0))


@pytest.mark.parametrize(
    ("pick", "k"), [("first", 1), ("one", 2), ("first_sentence", 3), ("other_sentences", 2), ("all", 0)]
)
def test_impossible_texts_are_refused(pick: str, k: int) -> None:
    with pytest.raises(ValueError, match=r"data\.texts: "):
        Text("txt", pick, k)


def test_batches_hold_several_texts_sample_major(tmp_path: Path) -> None:
    keys = numbered(tmp_path, [4])
    texts = {
        "caption": {"key": "captions", "pick": "all", "k": 2},
        "long": {"key": "long", "pick": "one"},
        "off": None,
    }
    (batch,) = shard_data(str(tmp_path), selection=str(tmp_path), texts=texts, batch_size=9).val_dataloader()
    assert batch["key"] == keys
    assert batch["caption"] == [f"caption {place} of {key}" for key in keys for place in range(2)]
    assert batch["long"] == [f"Picture {key}. It is plain. No dots." for key in keys]
    assert "off" not in batch
    assert batch["image"].dtype == torch.float32
    colours = torch.tensor([[number / 255, 0, 128 / 255] for number in range(4)])
    assert torch.equal(batch["image"], colours[:, :, None, None].expand(4, 3, 16, 16))


def test_random_captions_depend_on_seed_pass_and_sample_alone(tmp_path: Path) -> None:
    numbered(tmp_path, [6, 6])

    def captions(seed: int, shuffle: int) -> dict[tuple[int, str], list[str]]:
        texts = {"caption": Text("captions", "random", 2)}
        source = ShardStream(expand(str(tmp_path)), texts, 16, seed, shuffle, rank=0, world=1, progress=beginning(0))
        return {(s["position"][1], s["key"]): s["texts"]["caption"] for s in itertools.islice(source, 24)}

    here = captions(0, 4)
    assert here == captions(0, 0)  # not on what was read before
    assert here != captions(1, 4)
    assert [v for (number, _), v in sorted(here.items()) if number == 0] != [
        v for (number, _), v in sorted(here.items()) if number == 1
    ]


def test_other_sentences_are_drawn_anew_in_every_pass(tmp_path: Path) -> None:
    long = "One. " + ". ".join(f"Sentence {number}" for number in range(9))
    pack(tmp_path / "0.tar", {str(key): {"png": encoded(picture(key)), "json": {"long": long}} for key in range(4)})

    def captions(seed: int) -> dict[tuple[int, str], str]:
        texts = {"caption": Text("long", "other_sentences")}
        source = ShardStream(expand(str(tmp_path)), texts, 16, seed, 0, rank=0, world=1, progress=beginning(0))
        return {(s["position"][1], s["key"]): s["texts"]["caption"][0] for s in itertools.islice(source, 8)}

    here = captions(0)
    assert here == captions(0)
    assert here != captions(1)
    assert all(here[0, key] != here[1, key] for key in "0123")
    assert len({here[0, key] for key in "0123"}) > 1


# ----------------------------------------------------------------------------------------------------- stored features


def stored(number: int, strings: list[str]) -> bytes:
    """A member whose rows tell the sample and the place of the text: [number, place]."""
    text = np.array([[number, place] for place in range(len(strings))], np.float16)
    arrays = {"text": text, "strings": np.array(strings), "keys": np.array(["txt", "captions"])}
    np.savez(buffer := io.BytesIO(), image=np.array([number, 0.5], np.float16), **arrays)
    return buffer.getvalue()


FEATURED = {
    "caption": {"key": "txt", "pick": "one"},
    "captions": {"key": "captions", "pick": "random", "k": 3},
    "short": {"key": "captions", "pick": "first_sentence"},  # changed, so not looked up
    "label": {"key": "long", "pick": "one"},  # nobody encoded it
}


def featured(folder: Path) -> None:
    """Samples 1 to 4; 0 has no features, 5 lacks those of one caption, 6 is damaged."""
    members = {}
    for number in range(7):
        captions = [f"caption {place}" for place in range(number % 2 + 2)]
        members[str(number)] = {
            "png": encoded(picture(number)),
            "txt": f" raw {number}\n",
            "json": {"captions": captions, "long": "A. B. C."},
            "features.npz": stored(number, [f"raw {number}", *captions[: -1 if number == 5 else None]]),
        }
    members["0"].pop("features.npz")
    members["6"]["features.npz"] = members["6"]["features.npz"][:-30]
    pack(folder / "0.tar", members)


@pytest.mark.parametrize("workers", [0, 1])
def test_features_are_those_of_the_texts_that_were_drawn(workers: int, tmp_path: Path) -> None:
    featured(tmp_path)
    arguments: Any = {"texts": FEATURED, "batch_size": 4, "shuffle": 0, "workers": workers}
    loader = shard_data(str(tmp_path), features="features.npz", **arguments).train_dataloader()
    first, second = itertools.islice(loader, 2)
    for batch in (first, second):
        assert batch["key"] == ["1", "2", "3", "4"]
        assert batch["features"].keys() == {"image", "caption", "captions"}
        assert all(part.dtype == torch.float32 for part in batch["features"].values())
        assert batch["features"]["image"].tolist() == [[number, 0.5] for number in range(1, 5)]
        assert batch["features"]["caption"].tolist() == [[number, 0] for number in range(1, 5)]
        expected = [[1 + place // 3, 1 + int(text.split()[1])] for place, text in enumerate(batch["captions"])]
        assert batch["features"]["captions"].tolist() == expected
    assert (first["skipped"], second["skipped"]) == (1, 3)
    assert first["captions"] != second["captions"]


def test_features_change_no_draw_and_are_not_read_for_selection(tmp_path: Path) -> None:
    featured(tmp_path)
    arguments: Any = {"texts": FEATURED, "batch_size": 1, "shuffle": 8, "selection": str(tmp_path)}
    with_them, without = (shard_data(str(tmp_path), features=name, **arguments) for name in ("features.npz", None))
    found = {(b["position"][1], b["key"][0]): b for b in itertools.islice(with_them.train_dataloader(), 12)}
    for batch in itertools.islice(without.train_dataloader(), 21):
        assert "features" not in batch
        if other := found.pop((batch["position"][1], batch["key"][0]), None):
            assert all(batch[name] == other[name] for name in FEATURED)
    assert not found
    (keys, *_) = zip(*((batch["key"][0], "features" in batch) for batch in with_them.val_dataloader()), strict=True)
    assert keys == tuple("0123456")


@pytest.mark.parametrize(
    ("texts", "features", "message"),
    [
        (
            {"captions": {"key": "captions", "pick": "one"}},
            "features.npz",
            "nothing of the captions 'written later': annotate these shards again",
        ),
        (CAPTION, "latents.npz", r"no latents\.npz: make it by run=annotate annotator=features"),
    ],
)
def test_features_that_no_sample_has_stop_the_run(texts: Any, features: str, message: str, tmp_path: Path) -> None:
    members = {"png": encoded(picture(1)), "txt": "raw", "json": {"captions": ["written later"]}}
    pack(tmp_path / "0.tar", {"1": members | {"features.npz": stored(1, ["raw"])}})
    with pytest.raises(ValueError, match=f"no usable sample .*{message}"):
        next(iter(shard_data(str(tmp_path), texts=texts, features=features).train_dataloader()))


# ------------------------------------------------------------------------------------------------------ broken samples


def png_header(side: int) -> bytes:
    """The beginning of a PNG that says to be so large."""
    header = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))


def compressed_bomb(side: int = 20_000) -> bytes:
    """Black and whole: 50 MB of bits in 49 kB of file, which would be 1.2 GB as RGB."""
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


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_sample_is_skipped_and_counted(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "bomb":
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100 * 100 - 1)
    key = "caption" if "surrogate" in name else "txt"
    good = {"png": encoded(picture(0)), "txt": "fine", "json": {"caption": "fine"}}
    pack(tmp_path / "0.tar", {"0": BROKEN[name], "1": good, "2": BROKEN[name], "3": BROKEN[name], "4": good})
    texts = {"caption": {"key": key, "pick": "one"}}
    loader = iter(shard_data(str(tmp_path), texts=texts, shuffle=0, batch_size=1).train_dataloader())
    batches = list(itertools.islice(loader, 4))
    assert [batch["key"] for batch in batches] == [["1"], ["4"], ["1"], ["4"]]
    assert [batch["skipped"] for batch in batches] == [1, 2, 1, 2]
    assert [batch["position"] for batch in batches] == [(0, 0, 2), (0, 0, 5), (0, 1, 2), (0, 1, 5)]


@pytest.mark.parametrize("pick", ["one", "first_sentence", "other_sentences"])
def test_a_sample_without_the_text_asked_for_is_skipped_and_counted(pick: str, tmp_path: Path) -> None:
    members = {
        str(key): {"png": encoded(picture(key)), "txt": "x", "json": record}
        for key, record in enumerate([{"long": "a. b"}, {"caption": "c"}, {"long": " "}, {"long": "d. e"}])
    }
    pack(tmp_path / "0.tar", members)
    texts = {"caption": {"key": "long", "pick": pick}}
    loader = shard_data(str(tmp_path), texts=texts, shuffle=0, batch_size=2).train_dataloader()
    batch = next(iter(loader))
    assert (batch["key"], batch["skipped"]) == (["0", "3"], 2)


@pytest.mark.parametrize("workers", [0, 1])
def test_shards_without_a_usable_sample_stop_the_run_and_say_why(workers: int, tmp_path: Path) -> None:
    numbered(tmp_path, [3])
    data = shard_data(str(tmp_path), texts={"caption": {"key": "Long", "pick": "one"}}, workers=workers)
    with pytest.raises(ValueError, match=r"no usable sample .*no text under 'Long' .*caption, long, captions"):
        next(iter(data.train_dataloader()))
    data = shard_data(str(tmp_path))
    data.train_shards = []
    with pytest.raises(ValueError, match=r"lower data\.workers"):
        next(iter(data.train_dataloader()))


# ------------------------------------------------------------------------------------------------------- broken shards


def cut(data: bytes) -> bytes:
    return data[: len(data) * 2 // 3 // 512 * 512 + 100]


def cut_between_members(data: bytes) -> bytes:
    return data[: data.index(b"00003.png")]


def damaged_header(data: bytes) -> bytes:
    place = data.index(b"00003.png")
    return data[:place] + b"\xaa" * 512 + data[place + 512 :]


def not_a_tar(data: bytes) -> bytes:
    return b"<html>404</html>"


@pytest.mark.parametrize(
    ("damage", "readable"), [(cut, 3), (cut_between_members, 3), (damaged_header, 3), (not_a_tar, 0)]
)
def test_a_broken_shard_is_named_and_its_readable_part_used(
    damage: Any, readable: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    keys = numbered(tmp_path, [5, 5, 5])
    path = tmp_path / "00001.tar"
    whole = path.read_bytes()
    first = int(keys[5])
    path.write_bytes(damage(whole.replace(f"{first + 3:05d}.png".encode(), b"00003.png")))
    with caplog.at_level(logging.WARNING):
        found = [sample["key"] for sample in stream(tmp_path, endless=False)]
    assert found == keys[:5] + keys[5 : 5 + readable] + keys[10:]
    (line,) = caplog.messages
    assert f"shard {path} is broken" in line


@pytest.mark.parametrize("command", ["exit 3", "cat {}.absent", "cat {}; exit 3"])
def test_a_failed_command_is_named(command: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    keys = numbered(tmp_path, [4])
    url = "pipe:" + command.format(tmp_path / "00000.tar")
    found = [raw["__key__"] for raw in read_shard(url)]
    assert found == keys[: len(found)]
    (line,) = caplog.messages
    assert f"shard {url} is broken" in line


def test_a_shard_that_vanishes_is_named_and_the_others_go_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    numbered(tmp_path, [4, 4, 4])
    batches = iter(shard_data(str(tmp_path), workers=0, shuffle=0, batch_size=4).train_dataloader())
    first = set(next(batches)["key"])
    gone = next(path for path in sorted(tmp_path.glob("*.tar")) if f"{int(path.stem) * 4:05d}" not in first)
    gone.unlink()
    seen = {key for batch in itertools.islice(batches, 6) for key in batch["key"]}
    assert len(seen) == 8
    assert not seen & {f"{int(gone.stem) * 4 + place:05d}" for place in range(4)}
    assert f"shard {gone} is broken (" in caplog.text
    assert "No such file" in caplog.text


def test_a_run_whose_shards_all_vanish_stops(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    numbered(tmp_path, [4, 4])
    data = shard_data(str(tmp_path))
    for path in tmp_path.glob("*.tar"):
        path.unlink()
    with pytest.raises(ValueError, match="its shards cannot be read, which the log then says"):
        next(iter(data.train_dataloader()))
    assert "No such file" in caplog.text


def test_samples_of_one_key(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Two that lie apart are two samples; beside each other they are one, and what is there twice is named."""
    a, b, c = ({"png": encoded(picture(number)), "txt": str(number)} for number in range(3))
    pack(tmp_path / "0.tar", {"a": a, "b": b})
    pack(tmp_path / "1.tar", {"a": c})
    assert [(s["key"], s["txt"]) for s in samples(str(tmp_path))] == [("a", "0"), ("b", "1"), ("a", "2")]
    assert not caplog.messages
    with tarfile.open(tmp_path / "1.tar", "w") as tar:
        for key, members in ("a", a), ("a", b), ("c", c):  # as a writer leaves it that was started again
            add_sample(tar, key, {"png": members["png"], "txt": members["txt"].encode()})
    assert [s["txt"] for s in samples(str(tmp_path / "1.tar"))] == ["0", "2"]
    assert all("duplicate file name" in line for line in caplog.messages)
    assert len(caplog.messages) == 2


def test_padding_after_the_archive_is_no_failure(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    keys = numbered(tmp_path, [4])
    url = f"pipe:cat {tmp_path}/00000.tar; head -c 1000000 /dev/zero"
    assert [raw["__key__"] for raw in read_shard(url)] == keys
    assert not caplog.messages


# -------------------------------------------------------------------------------------------------------------- passes


@pytest.mark.parametrize("counts", [[7], [5, 0, 9], [3, 1, 4, 1, 5, 9, 2, 6]], ids=str)
@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_every_sample_once_a_pass(
    counts: list[int], world: int, workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = numbered(tmp_path, counts)
    endless: list[list[str]] = [[], [], []]
    single: list[str] = []
    for rank, worker in itertools.product(range(world), range(max(workers, 1))):
        info = SimpleNamespace(id=worker, num_workers=workers) if workers else None
        monkeypatch.setattr("clipfix.data.get_worker_info", lambda info=info: info)
        for number, part in enumerate(passes(stream(tmp_path, rank=rank, world=world, workers=workers), 3)):
            endless[number] += part
        single += [sample["key"] for sample in stream(tmp_path, rank=rank, world=world, endless=False)]
    assert [sorted(part) for part in (*endless, single)] == [keys] * 4


def test_shuffling_is_seeded_and_new_in_every_pass(tmp_path: Path) -> None:
    keys = numbered(tmp_path, [10, 10, 10])
    here = passes(stream(tmp_path, shuffle=8), 3)
    assert here == passes(pickle.loads(pickle.dumps(stream(tmp_path, shuffle=8))), 3)  # as a spawned worker gets it
    orders = [*here, *passes(stream(tmp_path, shuffle=8, seed=1), 3)]
    assert len({tuple(order) for order in orders}) == 6
    whole = passes(stream(tmp_path, shuffle=1000), 1)[0]  # a buffer larger than the data shuffles all of it
    assert {int(key) // 10 for key in whole[:10]} == {0, 1, 2}
    assert sorted(whole) == keys


def test_without_shuffling_shards_change_places_but_keep_their_order(tmp_path: Path) -> None:
    numbered(tmp_path, [4, 4, 4, 4, 4])
    first, second = passes(stream(tmp_path, shuffle=0), 2)
    for order in (first, second):
        shards = [order[place : place + 4] for place in range(0, 20, 4)]
        assert all(shard == sorted(shard) for shard in shards)
        assert len({int(shard[0]) // 4 for shard in shards}) == 5
    assert first != second


def test_selection_is_one_pass_in_stored_order_with_its_last_partial_batch(tmp_path: Path) -> None:
    keys = numbered(tmp_path, [4, 3])
    data = shard_data(str(tmp_path), selection=str(tmp_path), workers=1)
    loader = data.val_dataloader()
    for _ in range(2):
        batches = list(loader)
        assert [len(batch["key"]) for batch in batches] == [3, 3, 1]
        assert [key for batch in batches for key in batch["key"]] == keys
    assert shard_data(str(tmp_path)).val_dataloader() == []


def test_prepare_makes_the_shards(tmp_path: Path) -> None:
    data = shard_data(str(tmp_path / "new"), prepare=lambda: numbered(tmp_path / "new", [3]))
    assert len(next(iter(data.train_dataloader()))["key"]) == 3


# -------------------------------------------------------------------------------------------------------------- resume


def with_broken_samples(folder: Path) -> str:
    """Five shards, a third of their samples broken, one of them cut off."""
    rng = random.Random(0)
    for shard in range(5):
        members: dict[str, dict[str, Any]] = {}
        for number in range(6):
            broken = rng.choice(list(BROKEN.values())[:6]) if rng.random() < 0.33 else None
            members[f"{shard}{number}"] = broken or {"png": encoded(picture(number)), "txt": f"{shard}{number}"}
        pack(folder / f"{shard}.tar", members)
    path = folder / "3.tar"
    path.write_bytes(path.read_bytes()[:-4000])
    return str(folder)


def facts(batch: dict[str, Any]) -> tuple[Any, ...]:
    return batch["key"], batch["caption"], tuple(batch["position"]), batch["skipped"], batch["image"].sum().item()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stopped_stream_goes_on_with_exactly_the_next_batch(workers: int, tmp_path: Path) -> None:
    folder = with_broken_samples(tmp_path / "shards")
    whole = [facts(b) for b in itertools.islice(shard_data(folder, workers=workers).train_dataloader(), 20)]
    assert max(position[1] for _, _, position, _, _ in whole) > 1  # several passes
    assert sum(skipped for *_, skipped, _ in whole) > 5
    for stop in (1, 4, 13):
        stopped = shard_data(folder, workers=workers)
        for batch in itertools.islice(stopped.train_dataloader(), stop):
            stopped.advance(batch)
        torch.save(stopped.state_dict(), tmp_path / "state")
        resumed = shard_data(folder, workers=workers)
        resumed.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
        rest = [facts(batch) for batch in itertools.islice(resumed.train_dataloader(), 20 - stop)]
        assert rest == whole[stop:]


@pytest.mark.parametrize("workers", [0, 2])
def test_iterating_again_goes_on_where_training_stands(workers: int, tmp_path: Path) -> None:
    numbered(tmp_path, [10, 10, 10])
    whole = [facts(b) for b in itertools.islice(shard_data(str(tmp_path), workers=workers).train_dataloader(), 9)]
    data = shard_data(str(tmp_path), workers=workers)
    loader, again = data.train_dataloader(), []
    for _ in range(3):
        for batch in itertools.islice(loader, 3):
            again.append(facts(batch))
            data.advance(batch)
    assert again == whole


def test_another_number_of_workers_starts_the_next_pass(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    numbered(tmp_path, [10, 10])
    data = shard_data(str(tmp_path))
    for batch in itertools.islice(data.train_dataloader(), 8):  # 24 of 20 samples: in the second pass
        data.advance(batch)
    resumed = shard_data(str(tmp_path), workers=2)
    resumed.load_state_dict(data.state_dict())
    assert "start of pass 2" in caplog.text
    assert resumed.progress == beginning(2, number=2)


class Recorder(L.LightningModule):
    """Trains one number on batches and writes down which."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.trained: list[tuple[Any, ...]] = []

    def training_step(self, batch: dict[str, Any], index: int) -> torch.Tensor:
        self.trained.append(facts(batch))
        return self.weight * batch["image"].mean()

    def validation_step(self, batch: dict[str, Any], index: int) -> None: ...

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("workers", [0, 2])
def test_lightning_resumes_with_the_batch_after_the_checkpoint(workers: int, tmp_path: Path) -> None:
    folder = with_broken_samples(tmp_path / "shards")

    def fit(steps: int, resume: Path | None = None) -> list[tuple[Any, ...]]:
        module = Recorder()
        trainer = L.Trainer(
            max_steps=steps,
            accelerator="cpu",
            logger=False,
            callbacks=[ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=5, save_top_k=-1)],
            val_check_interval=3,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        data = shard_data(folder, selection=str(Path(folder) / "0.tar"), workers=workers)
        trainer.fit(module, data, ckpt_path=resume, weights_only=True)
        return module.trained

    whole = fit(12)
    assert fit(12, resume=tmp_path / "step=5.ckpt") == whole[5:]


def two_ranks(rank: int, folder: str, store: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    data = shard_data(folder)
    keys = []
    for batch in itertools.islice(data.train_dataloader(), 2 + rank):  # ranks may stand anywhere
        data.advance(batch)
        keys += batch["key"]
    state = data.state_dict()
    assert state["ranks"][rank] == data.progress
    resumed = shard_data(folder)
    resumed.load_state_dict(state)
    assert resumed.progress == data.progress
    gathered: list[Any] = [None, None]
    dist.all_gather_object(gathered, (state, keys))
    assert gathered[0][0] == gathered[1][0]  # one checkpoint serves all ranks
    assert not set(gathered[0][1]) & set(gathered[1][1])
    dist.destroy_process_group()


def test_a_checkpoint_holds_where_every_rank_stands(tmp_path: Path) -> None:
    numbered(tmp_path / "shards", [9, 9, 9, 9])
    arguments = (str(tmp_path / "shards"), str(tmp_path / "store"))
    torch.multiprocessing.start_processes(two_ranks, arguments, nprocs=2, start_method="fork")
