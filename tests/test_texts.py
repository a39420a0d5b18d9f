"""Which texts of a sample go into a batch, and the stored features of those that were drawn."""

import io
import itertools
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from shards import encoded, numbered, pack, picture
from streams import CAPTION, shard_data

from clipfix.data.shards import expand
from clipfix.data.stream import Decoder, ShardStream, start_of_pass
from clipfix.data.texts import Text

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
    data = shard_data(str(tmp_path), selection=str(tmp_path), texts=texts, batch_size=9)
    (batch,) = data.val_dataloader()
    assert batch["key"] == keys
    assert batch["caption"] == [f"caption {place} of {key}" for key in keys for place in range(2)]
    assert batch["long"] == [f"Picture {key}. It is plain. No dots." for key in keys]
    assert "off" not in batch
    assert batch["image"].dtype == torch.uint8
    colours = torch.tensor([[number / 255, 0, 128 / 255] for number in range(4)])
    images = data.on_after_batch_transfer(batch, 0)["image"]
    assert torch.equal(images, colours[:, :, None, None].expand(4, 3, 16, 16))


def test_random_captions_depend_on_seed_pass_and_sample_alone(tmp_path: Path) -> None:
    numbered(tmp_path, [6, 6])

    def captions(seed: int, shuffle: int) -> dict[tuple[int, str], list[str]]:
        texts = {"caption": Text("captions", "random", 2)}
        source = ShardStream(
            expand(str(tmp_path)), Decoder(texts, 16, seed), shuffle, rank=0, world=1, progress=start_of_pass(0)
        )
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
        source = ShardStream(
            expand(str(tmp_path)), Decoder(texts, 16, seed), 0, rank=0, world=1, progress=start_of_pass(0)
        )
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
    captions = {}
    for batch in itertools.islice(loader, 7):  # four passes of seven samples, three of which have no usable features
        keys = [int(key) for key in batch["key"]]
        assert set(keys) <= {1, 2, 3, 4}
        assert batch["features"].keys() == {"image", "caption", "captions"}
        assert all(part.dtype == torch.float32 for part in batch["features"].values())
        assert batch["features"]["image"].tolist() == [[number, 0.5] for number in keys]
        assert batch["features"]["caption"].tolist() == [[number, 0] for number in keys]
        expected = [[keys[place // 3], 1 + int(text.split()[1])] for place, text in enumerate(batch["captions"])]
        assert batch["features"]["captions"].tolist() == expected
        for key, *drawn in zip(keys, *(batch["captions"][place::3] for place in range(3)), strict=True):
            captions.setdefault(key, set()).add(tuple(drawn))
    assert captions.keys() == {1, 2, 3, 4}
    assert max(map(len, captions.values())) > 1  # drawn anew in each pass


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
            "of the captions 'written later': annotate these shards again",
        ),
        (CAPTION, "latents.npz", r"no latents\.npz: .*annotator=features"),
    ],
)
def test_features_that_no_sample_has_stop_the_run(texts: Any, features: str, message: str, tmp_path: Path) -> None:
    members = {"png": encoded(picture(1)), "txt": "raw", "json": {"captions": ["written later"]}}
    pack(tmp_path / "0.tar", {"1": members | {"features.npz": stored(1, ["raw"])}})
    with pytest.raises(ValueError, match=f"no usable sample .*{message}"):
        next(iter(shard_data(str(tmp_path), texts=texts, features=features).train_dataloader()))
