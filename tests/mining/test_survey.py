"""The survey of thresholds: planted cosines and truths, and the front door on tiny shards with doubles in them."""

import json
import shlex
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from shards import encoded, numbered, pack
from small import build

from clipfix.__main__ import main
from clipfix.annotate import survey
from clipfix.data.module import ShardData
from clipfix.data.needs import Needs
from clipfix.functional.positives import ReferenceFeatures, Thresholds, thresholds_for

WANTED = "method.mining.thresholds={image_text: 0.25, supported: 1.9, image_image: 0.9, text_text: 0.5}"


def planted(pair: torch.Tensor) -> ReferenceFeatures:
    """S_it [n, n, k] is exactly as given; no two images and no two captions are alike."""
    images = torch.eye(len(pair))
    return ReferenceFeatures(images, pair.permute(1, 2, 0).contiguous(), images)


@pytest.fixture
def counted() -> ReferenceFeatures:
    """Five samples of one caption: own ones at 0.5 ... 0.9, the others at 0.01 ... 0.20."""
    pair = torch.diag(torch.tensor([0.5, 0.6, 0.7, 0.8, 0.9]))
    pair[~torch.eye(5, dtype=torch.bool)] = torch.arange(1, 21) / 100
    return planted(pair[..., None])


def random_frozen(samples: int, captions: int) -> ReferenceFeatures:
    draws = torch.Generator().manual_seed(0)
    image, text = torch.randn(samples, 6, generator=draws), torch.randn(samples, captions, 6, generator=draws)
    text = F.normalize(text + image[:, None], dim=-1)
    return ReferenceFeatures(F.normalize(image, dim=-1), text, text.mean(dim=1))


def test_own_captions_and_others_are_kept_apart(counted):
    cosines = survey.spread(counted)
    found = {name: survey.describe(values) for name, values in cosines.items()}
    assert found["own"]["mean"] == pytest.approx(0.7)
    assert found["own"]["max"] == pytest.approx(0.9)
    assert (found["S_it"]["mean"], found["S_it"]["50 %"]) == (pytest.approx(0.105), pytest.approx(0.105))
    assert found["S_it"]["90 %"] == pytest.approx(0.181)
    assert found["S_ii"]["max"] == found["S_tt"]["max"] == 0


def test_counts_become_cosines_and_back(counted):
    """One of four others is the best quarter of twenty pairs: above the sixth largest. In a batch of 9, an eighth."""
    cosines = survey.spread(counted)
    one = Thresholds(1, 1, 1, 1)
    assert survey.cuts(cosines, one, among=5).image_text == pytest.approx(0.15)
    assert survey.cuts(cosines, Thresholds(1.6, 8, 1, 1), among=9)[:2] == pytest.approx((0.16, 0.01))
    judged = survey.judge(counted, cosines, Thresholds(0.15, 0.1, 0.5, -1.0), among=5)
    assert judged["alone"] == pytest.approx({"image_text": 1, "supported": 2, "image_image": 0, "text_text": 4})
    assert judged["promoted"] == pytest.approx({"image_text": 1, "image_image": 0, "text_text": 2, "together": 2})


def test_cuts_are_those_that_training_finds():
    frozen, extra = random_frozen(40, 3), Thresholds(0.3, 2.0, 0.5, 1.0)
    cuts = survey.cuts(survey.spread(frozen), extra, among=16)
    assert cuts == pytest.approx(thresholds_for(frozen, extra, among=16), abs=2e-3)


def test_suggestion_asks_of_pairs_what_own_captions_give(counted):
    """All others fit worse than own captions, so their median and quartile decide; the other two follow the counts."""
    cosines = survey.spread(counted) | {"S_ii": np.arange(20) / 100}
    suggested = survey.suggest(cosines, Thresholds(1, 4, 1, 1), among=5)
    assert suggested == pytest.approx((0.7, 0.6, 0.14, 0.0), abs=1.1e-4)
    cosines["S_it"] = cosines["S_it"] + 0.75  # all of them fit better: the count decides
    assert survey.suggest(cosines, Thresholds(1, 4, 1, 1), 5)[:2] == pytest.approx((0.9, 0.76), abs=1.1e-4)


def test_a_perfect_reference_has_area_one_and_a_blind_one_that_of_chance():
    same = torch.arange(12) // 3
    image = F.one_hot(same).float()
    frozen = ReferenceFeatures(
        image, image[:, None].expand(-1, 2, -1), torch.eye(12)
    )  # captions among themselves: all strangers
    truth = survey.Truth(frozen, survey.spread(frozen), same)
    found = truth.judge({"configured": Thresholds(0.5, 2.0, 0.5, 0.5), "suggested": Thresholds(2.0, 2.0, -1.0, 2.0)})
    assert found["share"] == pytest.approx(2 / 11)
    assert found["image_text"]["area"] == found["image_image"]["area"] == 1
    assert found["text_text"]["area"] == pytest.approx(2 / 11)
    assert found["image_text"]["configured"] == found["together"]["configured"] == {"precision": 1, "recall": 1}
    assert found["image_image"]["suggested"] == pytest.approx({"precision": 2 / 11, "recall": 1})
    assert found["together"]["suggested"] == {"precision": None, "recall": 0}


def test_no_sample_is_looked_at_twice(clip_folder, tmp_path):
    """Three batches of eight would begin twenty samples anew."""
    numbered(tmp_path, [20])
    texts = {"caption": {"key": "txt", "pick": "one"}, "captions": {"key": "captions", "pick": "all", "k": 2}}
    data = ShardData(str(tmp_path), None, texts, batch_size=8, workers=0, shuffle=0, seed=0, needs=Needs(32))
    data.setup()
    method = build("fff", clip_folder, "no generator")
    assert survey.collect(method, data, 100)[0].text.shape[:2] == (16, 3)
    assert len(survey.collect(method, data, 10)[0].image) == 10
    data.batch_size = 21
    with pytest.raises(ValueError, match=r"lower data\.batch_size"):
        survey.collect(method, data, 100)


# -- the front door ----------------------------------------------------------------------------------------------------


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Runs `run=thresholds` on 24 pictures that are there twice; returns what it wrote, and printed."""
    draws = np.random.default_rng(0)
    members = {}
    for number in range(24):
        picture = encoded(Image.fromarray(draws.integers(0, 256, (4, 4, 3), np.uint8)).resize((64, 64)))
        for copy in range(2):
            captions = [f"picture {number} seen {way}" for way in ("near", "far")]
            record = {"captions": captions, "thing": str(number)}
            members[f"{number:03d}{copy}"] = {"png": picture, "txt": f"number {number}", "json": record}
    pack(tmp_path / "shards" / "00000.tar", members)
    monkeypatch.chdir(tmp_path)
    texts = ["captions={key: captions, pick: all, k: 2}", "thing={key: thing, pick: one}"]

    def run(*arguments: str) -> tuple[dict, str]:
        settings = ["run=thresholds", "method=fff", "data=shards", f"data.train={tmp_path / 'shards'}"]
        settings += ["data.batch_size=16", "data.workers=0", *(f"++data.texts.{text}" for text in texts)]
        monkeypatch.setattr(sys, "argv", ["clipfix", *settings, *arguments])
        monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
        main()
        written = max(tmp_path.glob("outputs/*/*/thresholds.json"), key=lambda path: path.stat().st_mtime_ns)
        return json.loads(written.read_text()) | {"folder": written.parent}, capsys.readouterr().out

    return run


def test_what_is_suggested_promotes_that_many_when_pasted(command):
    first, printed = command("thresholds@method.mining.thresholds=counts", WANTED, "method.mining.same=thing")
    for name in ("thresholds", "precision_recall"):
        with Image.open(first["folder"] / f"{name}.png") as image:
            assert min(image.size) > 300
    assert first["samples"] == 48
    assert first["configured"]["alone"]["supported"] == pytest.approx(1.9, abs=0.02)
    assert first["same"]["share"] == pytest.approx(1 / 47)
    assert first["same"]["image_image"]["area"] == pytest.approx(1)  # doubles have a cosine of 1, and nothing else has
    pasted = [
        shlex.split(line) for line in printed.splitlines() if line.startswith("  thresholds@method.mining.thresholds=")
    ]
    assert [options[0].partition("=")[2] for options in pasted] == ["cosines", "counts"]
    for options in pasted:
        again, _ = command(*options)
        assert "same" not in again
        assert again["configured"]["promoted"] == pytest.approx(first["suggested"]["promoted"], rel=0.1, abs=0.02)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (["method=finetune"], ["method=finetune", "method=fff"]),
        (["method.mining.thresholds=null"], ["method.mining.thresholds is null"]),
        (["data.batch_size=1"], ["data.batch_size is 1"]),
        (["method.mining.same=cluster"], ["data.texts.cluster"]),
    ],
)
def test_mistakes_get_one_clear_error(wrong, words, command):
    with pytest.raises(SystemExit) as exit_:
        command(*wrong)
    assert all(word in str(exit_.value.code) for word in words), exit_.value.code
