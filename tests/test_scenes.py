"""The drawn world: exact ground truth, words that are true of it, and splits that share nothing."""

import json
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from hashlib import sha256
from pathlib import Path
from random import Random

import numpy as np
import open_clip
import pytest
import webdataset as wds

from clipfix.data.scenes import (
    KINDS,
    PATTERNS,
    Scene,
    Thing,
    World,
    captions,
    draw,
    factors,
    look_alike,
    pairs,
    sample,
)
from clipfix.data.scenes.shards import Job, contents, series, split_of
from clipfix.data.scenes.world import CARRIED, values

NOISE = {"junk": 0.08, "wrong": 0.05}
SETTINGS = {
    "train": 64, "selection": 24, "test": 24, "pairs_train": 1, "pairs_selection": 1, "pairs_test": 2,
    "summaries_test": 6, **NOISE, "train_junk": 0.08, "train_wrong": 0.05, "popular": 0,
}  # fmt: skip

SIDES = ("above", "below", "to the left of", "to the right of")
PLACES = (
    "at the top left", "at the top", "at the top right",
    "on the left", "in the middle", "on the right",
    "at the bottom left", "at the bottom", "at the bottom right",
)  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return World(tmp_path_factory.mktemp("data") / "scenes", seed=0, **SETTINGS)()


def read(world: Path, name: str) -> list[dict]:
    return list(wds.WebDataset(sorted(map(str, world.glob(f"{name}-0*.tar"))), shardshuffle=False).decode("rgb8"))


def scenes(number: int, seed: int = 0) -> list[Scene]:
    rng = Random(seed)
    return [sample(rng) for _ in range(number)]


def tokens(texts: list[str]) -> list[int]:
    return (open_clip.get_tokenizer("ViT-B-32", context_length=300)(texts) != 0).sum(dim=1).tolist()


def changes(first: Scene, second: Scene) -> list[str]:
    """The factors in which two scenes differ."""
    assert (first.background, first.jitter) == (second.background, second.jitter)
    return [
        factor
        for a, b in zip(first.things, second.things, strict=True)
        for factor in vars(a)
        if getattr(a, factor) != getattr(b, factor)
    ]


# The oracle reads English again, knowing nothing of the code that wrote it.


def says(phrase: str, thing: dict) -> bool:
    """Whether a noun phrase is true of a thing."""
    head, _, tail = re.fullmatch(
        rf"(.*?)\b({'|'.join(KINDS)})(?:es|s)?( .*)?", phrase
    ).groups("")  # fmt: skip
    kind = re.search(rf"\b({'|'.join(KINDS)})(?:es|s)?\b", phrase)[1]
    number, *adjectives = head.split()
    place = next((p for p in sorted(PLACES, key=len, reverse=True) if tail.endswith(p)), None)
    rest = tail.removesuffix(place or "").strip()
    found = {match[0]: match for match in re.finditer(
        r"(facing|pointing) (?P<way>\w+)|with the letter (?P<letter>\w)|seen from (?P<view>above|the side)"
        r"|(?P<feature>with|without) (?:a )?(hats?|handles?|chimneys?|sunglasses)", rest,
    )}  # fmt: skip
    assert " ".join(found) == rest, f"not understood: {phrase!r}"
    facts = {key: value for match in found.values() for key, value in match.groupdict().items() if value}
    return (
        thing["kind"] == kind
        and thing["count"] == {"a": 1, "an": 1, "one": 1, "two": 2, "three": 3, "four": 4}[number]
        and set(adjectives) <= {thing["size"], thing["state"], thing["fill"], thing["colour"]}
        and facts.get("way") in (None, thing["orientation"])
        and facts.get("letter") in (None, thing["letter"])
        and facts.get("view") in (None, thing["viewpoint"])
        and ("feature" not in facts or (facts["feature"] == "with") is thing["presence"])
        and (place is None or PLACES.index(place) == thing["place"])
    )


def is_true(text: str, scene: dict) -> bool:
    """Whether a caption or statement is true of a scene."""
    text = re.sub(r"^an? (photo|picture|illustration|drawing) of ", "", text)
    if background := re.search(r" on an? (\w+) background$", text):
        text = text.removesuffix(background[0])
        if background[1] != scene["background"]:
            return False
    for part in re.split(r", and |, | and ", text):
        subject, *relation = re.split(rf" ({'|'.join(SIDES)}) (?=an? )", part)
        phrases = [subject, *relation[1:]]
        found = [next((thing for thing in scene["things"] if says(phrase, thing)), None) for phrase in phrases]
        if None in found:
            return False
        if relation:
            (row, column), (other_row, other_column) = (divmod(thing["place"], 3) for thing in found)
            if not (row < other_row, row > other_row, column < other_column, column > other_column)[
                SIDES.index(relation[0])
            ]:
                return False
    return True


def test_scenes_follow_from_the_seed() -> None:
    first, second = (
        [(s, captions(s, Random(1), None, **NOISE), draw(s).tobytes()) for s in scenes(20)] for _ in range(2)
    )
    assert first == second
    assert scenes(20) != scenes(20, seed=1)


def test_captions_are_true_and_name_everything() -> None:
    for scene in scenes(200):
        for text in captions(scene, Random(2), None, **NOISE)["captions"]:
            assert is_true(text, scene.to_dict()), (text, scene)
            assert all(re.search(rf"\b{thing.kind}", text) for thing in scene.things)


def test_long_captions_have_100_to_230_tokens_and_open_with_a_summary() -> None:
    texts = [captions(scene, Random(3), None, **NOISE)["long"] for scene in scenes(200)]
    lengths = tokens(texts)
    assert 100 <= min(lengths) <= max(lengths) <= 230
    assert max(tokens([text.split(". ")[0] for text in texts])) <= 40
    assert all(text.count(". ") >= 5 for text in texts)


def test_long_captions_say_every_factor() -> None:
    for scene in scenes(100):
        text = captions(scene, Random(4), None, **NOISE)["long"]
        for thing in scene.things:
            said = (
                thing.colour,
                thing.size,
                thing.fill,
                thing.state,
                thing.orientation,
                thing.viewpoint,
                scene.background,
            )
            assert all(word in text for word in (*said, PLACES[thing.place]) if word)
            assert thing.letter is None or f"the letter {thing.letter}" in text
            assert thing.presence is None or ("with " if thing.presence else "without ") in text


def test_short_captions_are_short_lower_case_and_sometimes_junk() -> None:
    rng = Random(5)
    texts = [captions(scene, rng, None, **NOISE)["short"] for scene in scenes(1500)]
    junk = [text for text in texts if not any(kind in text for kind in KINDS)]
    assert 0.05 < len(junk) / len(texts) < 0.11
    assert all(text == text.lower() for text in texts)
    assert 6 < np.mean(tokens(texts)) < 10


@pytest.mark.parametrize("pattern", PATTERNS)
def test_pairs_differ_in_one_factor_and_each_statement_is_true_of_its_own_picture_only(pattern: str) -> None:
    rng = Random(6)
    for _ in range(40):
        first, first_statement, second, second_statement = pairs(rng, pattern)
        assert is_true(first_statement, first.to_dict())
        assert is_true(second_statement, second.to_dict())
        assert not is_true(first_statement, second.to_dict())
        assert not is_true(second_statement, first.to_dict())
        changed = changes(first, second)
        assert changed == ["place", "place"] or (len(changed) == 1 and changed[0] in PATTERNS[pattern])
        assert visible(first, second) >= 10


def visible(first: Scene, second: Scene) -> int:
    """How many of 48 x 48 pixels differ clearly."""
    a, b = (np.asarray(draw(scene).resize((48, 48)), dtype=int) for scene in (first, second))
    return int((np.abs(a - b).max(axis=2) > 40).sum())


@pytest.mark.parametrize("kind", KINDS)
def test_every_value_of_every_factor_can_be_seen(kind: str) -> None:
    thing = Thing(kind, "red", "large", 4, **{factor: options[0] for factor, options in CARRIED[kind].items()})
    scene = Scene((thing,), "cream", ((0, 0),))
    for factor in ("colour", "size", "count", "place", *CARRIED[kind]):
        looks = [scene] + [
            Scene((Thing(**{**vars(thing), factor: value}),), "cream", ((0, 0),)) for value in values(scene, 0, factor)
        ]
        for index, look in enumerate(looks):
            assert all(visible(look, other) >= 10 for other in looks[:index]), (factor, look)


def test_pictures_are_sharp_at_any_size() -> None:
    scene = scenes(1)[0]
    small, large = draw(scene), draw(scene, 256)
    assert (small.size, large.size, small.mode) == ((64, 64), (256, 256), "RGB")
    assert np.abs(np.asarray(small, dtype=int) - np.asarray(large.reduce(4), dtype=int)).mean() < 2


def test_kinds_within_a_scene_and_looks_within_a_series_differ() -> None:
    for scene in scenes(200):
        assert max(Counter(thing.kind for thing in scene.things).values()) == 1
    for seed in range(50):
        base, *looks = series(Random(seed))
        patterns = []
        for look in looks:
            changed = changes(base, look)
            assert len(changed) == 1 or changed == ["place", "place"]
            patterns.append(next(pattern for pattern, own in PATTERNS.items() if changed[0] in own))
        assert len(set(patterns)) == 3
        assert {split_of(scene) for scene in (base, *looks)} == {"train"}


def test_a_pattern_that_nothing_carries_gives_no_look_alike() -> None:
    heart = Scene((Thing("heart", "red", "large", 0, letter="A"),), "sky", ((0, 0),))
    assert look_alike(heart, "Viewpoint and Perspective", Random(0)) is None
    assert look_alike(heart, "Text", Random(0)) != heart


def test_factors_are_flat_and_cover_the_probes() -> None:
    scene = Scene((Thing("cup", "blue", "small", 2, presence=False, viewpoint="above"),), "mint", ((0, 0),))
    assert factors(scene) == {
        "shape": "cup", "colour": "blue", "size": "small", "fill": None, "orientation": None, "presence": "without",
        "state": None, "count": 1, "row": "top", "column": "right", "letter": None, "viewpoint": "above",
    }  # fmt: skip


def test_shards_hold_the_schema(world: Path) -> None:
    assert sorted(path.name for path in world.iterdir()) == [
        "info.json", "pairs-selection-00000.tar", "pairs-test-00000.tar", "pairs-train-00000.tar",
        "selection-00000.tar", "summaries-test-00000.tar", "test-00000.tar", "train-00000.tar",
    ]  # fmt: skip
    sizes = {"train": 64, "selection": 24, "test": 24, "pairs-train": 18, "pairs-selection": 18, "pairs-test": 36}
    sizes["summaries-test"] = 24
    for name, number in sizes.items():
        stored = read(world, name)
        assert len({entry["__key__"] for entry in stored}) == number
        for entry in stored:
            record = entry["json"]
            assert entry["png"].shape == (64, 64, 3)
            assert entry["txt"] == record["caption"]
            assert len(record["captions"]) == 5
            assert record["factors"]["shape"] == record["scene"]["things"][0]["kind"]
            assert is_true(record["captions"][0], record["scene"])


def test_stored_pairs_are_neighbours(world: Path) -> None:
    records = [entry["json"] for entry in read(world, "pairs-test")]
    assert [record["pair"] for record in records] == [i // 2 for i in range(36)]
    assert Counter(record["pattern"] for record in records) == dict.fromkeys(PATTERNS, 4)
    for first, second in zip(records[::2], records[1::2], strict=True):
        assert is_true(first["statement"], first["scene"])
        assert not is_true(first["statement"], second["scene"])


def test_four_scenes_share_a_summary_that_is_true_of_each(world: Path) -> None:
    records = [entry["json"] for entry in read(world, "summaries-test")]
    for start in range(0, 24, 4):
        group = records[start : start + 4]
        (summary,) = {record["long"].split(". ")[0] + "." for record in group}
        assert all(record["summary"] == summary and is_true(summary[:-1].lower(), record["scene"]) for record in group)
        assert len({json.dumps([record["scene"]["things"], record["scene"]["background"]]) for record in group}) == 4
        assert len({record["long"] for record in group}) == 4


def test_stored_series_are_neighbours(world: Path) -> None:
    assert [entry["json"]["series"] for entry in read(world, "train")] == [i // 4 for i in range(64)]


def test_popular_scenes_come_again_with_other_words_and_other_pixels(tmp_path: Path) -> None:
    noisy = SETTINGS | {"train": 400, "popular": 10, "train_junk": 0.5, "processes": 1}
    folder = World(tmp_path / "scenes", seed=0, **noisy)()
    stored = read(folder, "train")
    shown: dict[str, list[dict]] = {}
    for entry in stored:
        shown.setdefault(entry["json"]["same_scene"], []).append(entry)
    groups = [group for group in shown.values() if len(group) > 1]
    assert len(groups) == 10
    assert 0.4 < sum(map(len, groups)) / 400 < 0.6
    for group in groups:
        assert len({json.dumps([entry["json"]["scene"]["things"]]) for entry in group}) == 1
        assert len({entry["json"]["same_things"] for entry in group}) == 1
        assert len({entry["txt"] for entry in group}) > 1
        assert len({entry["png"].tobytes() for entry in group}) > 1
        assert all(is_true(group[0]["json"]["captions"][0], entry["json"]["scene"]) for entry in group)
    assert len({entry["json"]["same_things"] for entry in stored}) < len(shown), "other scenes show the same things"
    junk = [entry for entry in stored if not any(kind in entry["txt"] for kind in KINDS)]
    assert 0.4 < len(junk) / 400 < 0.6
    plain = World(tmp_path / "plain", seed=0, **SETTINGS)()
    assert (folder / "test-00000.tar").read_bytes() == (plain / "test-00000.tar").read_bytes(), "tests stay as they are"


def test_splits_share_no_picture() -> None:
    jobs = [
        Job("scenes", split, 0, size, 0, **NOISE) for split, size in (("train", 800), ("selection", 300), ("test", 300))
    ]
    jobs += [Job("scenes", "train", 0, 800, 0, **NOISE, popular=20)]
    jobs += [
        Job("pairs", "selection", 0, 10, 0, **NOISE),
        Job("pairs", "test", 0, 20, 0, **NOISE),
        Job("summaries", "test", 0, 30, 0, **NOISE),
    ]
    seen: dict[str, set[bytes]] = {"train": set(), "selection": set(), "test": set()}
    for job in jobs:
        seen[job.split] |= {sha256(draw(scene).tobytes()).digest() for scene, _ in contents(job)}
    assert not seen["train"] & seen["test"]
    assert not seen["train"] & seen["selection"]
    assert not seen["selection"] & seen["test"]


def test_shards_are_the_same_bytes_whatever_the_processes_and_a_second_call_keeps_them(
    world: Path, tmp_path: Path
) -> None:
    again = World(tmp_path / "scenes", seed=0, **SETTINGS, processes=1)()
    for path in world.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes()
    before = {path: path.stat().st_mtime_ns for path in again.iterdir()}
    World(again, seed=0, **SETTINGS)()
    assert {path: path.stat().st_mtime_ns for path in again.iterdir()} == before


def test_the_slower_of_two_callers_takes_the_folder_of_the_faster(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def overtaken(drawn: Iterable[None], **_: object) -> Iterator[None]:
        yield from drawn
        shutil.copytree(world, tmp_path / "scenes")

    monkeypatch.setattr("clipfix.data.scenes.shards.track", overtaken)
    assert World(tmp_path / "scenes", seed=0, **SETTINGS, processes=1)() == tmp_path / "scenes"
    assert list(tmp_path.iterdir()) == [tmp_path / "scenes"], "the slower one's draft was left behind"


def test_changed_settings_and_foreign_folders_are_named(world: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.prepare\.root.*seed"):
        World(world, seed=1, **SETTINGS)()
    (tmp_path / "photo.jpg").touch()
    with pytest.raises(ValueError, match=r"data\.prepare\.root.*None"):
        World(tmp_path, seed=0, **SETTINGS)()
    with pytest.raises(ValueError, match=r"data\.prepare\.train=63"):
        World(tmp_path / "new", seed=0, **SETTINGS | {"train": 63})()
    assert json.loads((world / "info.json").read_text())["seed"] == 0
