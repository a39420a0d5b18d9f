"""Broken results.json and outcomes.npz: one line that names the file, never another library's traceback."""

import copy
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runs import run

from clipfix.results.compare.results import check_comparable, group, read
from clipfix.results.compare.rows import rows

WRONG = [None, [], {}, 5, -1.5, "text", [None], {"a": 1}, True, "[red]x[/red]"]
BROKEN = {
    "a list for benchmarks": {"benchmarks": []},
    "a benchmark that is a list": {"benchmarks": {"pairs": []}},
    "a number for data": {"data": 5},
    "urls that are numbers": {"data": {"pairs": {"urls": [1]}}},
    "urls that are no list": {"data": {"pairs": {"urls": 1}}},
    "versions that are a number": {"versions": 3},
    "a seed that is a list": {"seed": [1]},
    "no scores": {"scores": {"before": {}, "after": {}}},
    "other metrics before": {"scores": {"before": {"eval/pairs/x": 1.0}, "after": {"eval/pairs/mean": 1.0}}},
    "a name without a slash": {"scores": {"before": {"abc": 1.0}, "after": {"abc": 1.0}}},
    "an empty name": {"scores": {"before": {"": 1.0}, "after": {"": 1.0}}},
    "text for a score": {"scores": {"before": {"eval/pairs/mean": "x"}, "after": {"eval/pairs/mean": 1.0}}},
    "three columns": {"scores": {name: {"eval/pairs/mean": 1.0} for name in "abc"}},
}


def compared(path: Path) -> None:
    """Do what run=compare does before it draws."""
    result = read(path)
    check_comparable([result, result])
    rows(group([result]), [], 10, 0.95, 0)


@pytest.fixture
def good(tmp_path) -> Path:
    path = run(tmp_path / "good")
    compared(path)
    return path


@pytest.mark.parametrize("change", BROKEN.values(), ids=BROKEN)
def test_a_broken_result_file_is_named_in_one_line(change, good):
    good.write_text(json.dumps(json.loads(good.read_text()) | change))
    with pytest.raises(ValueError, match="results") as error:
        compared(good)
    assert str(good.parent) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, '{"scores": 1}', "null", "\x00"])
def test_text_that_is_no_result_is_named_in_one_line(text, good):
    good.write_text(text)
    with pytest.raises(ValueError, match=r"is not a results\.json"):
        compared(good)


def places(node: Any, path: tuple = ()) -> list[tuple]:
    nested = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [path, *(place for key, value in nested for place in places(value, (*path, key)))]


def test_200_mutations_are_accepted_or_named_in_one_line(good):
    """One value of another type, or one key less, anywhere in the file."""
    stored, rng = json.loads(good.read_text()), random.Random(0)
    candidates, refused = [place for place in places(stored) if place], 0
    for _ in range(200):
        changed, place = copy.deepcopy(stored), rng.choice(candidates)
        node = changed
        for key in place[:-1]:
            node = node[key]
        if rng.random() < 0.3:
            del node[place[-1]]
        else:
            node[place[-1]] = rng.choice(WRONG)
        good.write_text(json.dumps(changed))
        said = ""
        try:
            compared(good)
        except ValueError as error:
            said = str(error)
        if said:
            refused += 1
            assert str(good.parent) in said, place
            assert "\n" not in said, place
    assert refused > 50


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


ARRAYS = {
    "no columns": lambda arrays: arrays.pop("columns"),
    "two equal columns": lambda arrays: arrays.update(columns=np.array(["after", "after"])),
    "other columns": lambda arrays: arrays.update(columns=np.array(["a", "b"])),
    "columns that are numbers": lambda arrays: arrays.update(columns=np.array([1, 2])),
    "no ranks": lambda arrays: arrays.pop("pairs/ranks"),
    "ranks of one column": lambda arrays: arrays.update({"pairs/ranks": arrays["pairs/ranks"][0]}),
    "ranks of fewer items": lambda arrays: arrays.update({"pairs/ranks": arrays["pairs/ranks"][:, 1:]}),
    "ranks that are text": lambda arrays: arrays.update({"pairs/ranks": arrays["pairs/ranks"].astype(str)}),
    "fewer items": lambda arrays: arrays.update({"pairs/items": arrays["pairs/items"][1:]}),
    "weights that are text": lambda arrays: arrays.update({"pairs/weights": arrays["pairs/weights"].astype(str)}),
}


@pytest.mark.parametrize("change", ARRAYS.values(), ids=ARRAYS)
def test_broken_outcomes_are_named_in_one_line(change, good):
    path = good.parent / "outcomes.npz"
    arrays = dict(np.load(path))
    change(arrays)
    np.savez(path, **arrays)
    with pytest.raises(ValueError, match=r"outcomes\.npz") as error:
        compared(good)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("data", [b"", b"text", cut], ids=["empty", "text", "cut"])
def test_outcomes_that_are_no_archive_are_named_in_one_line(data, good):
    path = good.parent / "outcomes.npz"
    path.write_bytes(data(path.read_bytes()) if callable(data) else data)
    with pytest.raises(ValueError, match=r"outcomes\.npz is not an outcomes\.npz"):
        compared(good)
