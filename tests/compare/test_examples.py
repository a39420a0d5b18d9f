"""Examples from a published data set, read from where the result file says that it lies."""

import shutil
from pathlib import Path

import pytest
from PIL import Image
from runs import PICTURES, SETTINGS, run

from clipfix.results.compare.examples import Case, changed
from clipfix.results.compare.results import group, read


@pytest.fixture
def urban1k(tmp_path) -> dict:
    """Picture i is grey 5 i, and its caption says so."""
    root = tmp_path / "Urban1k"
    for name in ("image", "caption"):
        (root / name).mkdir(parents=True)
    for i in range(PICTURES):
        Image.new("RGB", (8, 8), (5 * i,) * 3).save(root / "image" / f"{i:06d}.jpg", quality=95)
        (root / "caption" / f"{i:06d}.txt").write_text(f"{5 * i} of 255")
    return {"_target_": "clipfix.data.sets.urban1k.Urban1k", "root": str(root), "fetch": "Fetch it.", "samples": 1000}


def examples(folder: Path, shards: dict) -> tuple[list[Case], list[str]]:
    asked = {"shards": shards, "text": {"key": "captions", "pick": "one"}, "recall_at": [1, 5]}
    path = run(folder, benchmarks=SETTINGS | {"retrieval_long": asked})
    return changed(group([read(path)]), 4)


def test_pictures_and_captions_are_those_of_the_set(urban1k, tmp_path):
    cases, told = examples(tmp_path / "run", urban1k)
    assert told == []
    assert [case.better for case in cases] == [True, True, False, False]
    assert len({case.texts[0] for case in cases}) == 4
    for case in cases:
        assert f"{case.image.getpixel((0, 0))[0]} of 255" == case.texts[0]


def test_a_set_that_is_gone_is_one_line_and_other_code_is_not_run(urban1k, tmp_path):
    shutil.rmtree(urban1k["root"])
    cases, (line,) = examples(tmp_path / "gone", urban1k)
    assert cases == []
    assert "Urban1k/image. Fetch it." in line
    for target in ("subprocess.run", "clipfix.data.sets.urban1k.Path"):
        cases, (line,) = examples(tmp_path / target, {"_target_": target, "args": ["false"]})
        assert cases == []
        assert f"{target} is not a data set of clipfix.data.sets" in line
