"""The picture of promoted pairs: a planted double is in it, and drawing it asks nothing of other ranks."""

import logging
import sys
from types import SimpleNamespace

import pytest
import torch.distributed as dist
import yaml
from hydra.utils import instantiate
from PIL import Image
from small import CONF, batch, build

from clipfix.__main__ import main
from clipfix.parts.mining import Promotion
from clipfix.results.pictures import fff as promoted
from clipfix.results.pictures.fff import Promoted, choose

DOUBLES = {"image_text": 2.0, "supported": -1.0, "image_image": 0.99999, "text_text": 2.0}
NOTHING = dict.fromkeys(DOUBLES, 2.0)


@pytest.fixture
def step(clip_folder, tmp_path, monkeypatch):
    """Ends step n of a training whose batch shows its picture 1 again as 4; returns the cells it drew, if any."""
    inputs = batch(6)
    inputs["image"][4] = inputs["image"][1]
    drawn = []

    def gallery(cells, **layout):
        drawn.append(cells)
        return original(cells, **layout)

    original = promoted.gallery
    monkeypatch.setattr(promoted, "gallery", gallery)

    def run(callback: Promoted, number: int, thresholds: dict, **trainer) -> list:
        method = build("fff", clip_folder, "no generator", mining={"thresholds": thresholds})
        drawn.clear()
        told = SimpleNamespace(**{"global_step": number, "is_global_zero": True, "loggers": []} | trainer)
        callback.on_train_batch_end(told, method, None, inputs, 0)
        return [cell for cells in drawn for cell in cells]

    return run


def test_a_planted_double_is_drawn_beside_its_picture(step, tmp_path):
    image, other = step(Promoted(str(tmp_path), 1, pairs=4), 1, DOUBLES)
    assert image.image.tobytes() == other.image.tobytes()
    assert image.title == "image_image"
    assert "S_ii 1.000" in image.lines[0][0]
    assert other.lines[0][0] in {*batch(6)["captions"], *batch(6)["caption"]}
    with Image.open(tmp_path / "promoted.png") as picture:
        assert min(picture.size) > 100


def test_other_ranks_are_not_asked_and_draw_nothing(step, tmp_path, monkeypatch):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    for name in ("all_gather", "all_reduce", "broadcast", "barrier"):
        monkeypatch.setattr(dist, name, lambda *_, **__: pytest.fail("a collective, in which other ranks do not join"))
    assert step(Promoted(str(tmp_path), 1, pairs=4), 1, DOUBLES)
    assert not step(Promoted(str(tmp_path), 1, pairs=4), 1, DOUBLES, is_global_zero=False)


def test_drawn_after_the_first_step_and_every_nth(step, tmp_path):
    callback = Promoted(str(tmp_path), 3, pairs=1)
    drawn = [number for number in (1, 2, 3, 3, 4, 5, 6, 7) if step(callback, number, DOUBLES)]
    assert drawn == [1, 3, 6]


def test_nothing_promoted_is_said_once(step, tmp_path, caplog):
    callback = Promoted(str(tmp_path), 1, pairs=4)
    with caplog.at_level(logging.WARNING):
        assert not [number for number in (1, 2, 3) if step(callback, number, NOTHING)]
    assert [record.message for record in caplog.records].count(caplog.records[0].message) == len(caplog.records) == 1
    assert "run=thresholds" in caplog.text
    assert not (tmp_path / "promoted.png").exists()


def test_a_rare_condition_is_shown_and_no_two_pictures_again():
    def pair(image: int, sample: int, *reasons: str) -> Promotion:
        return Promotion(image, sample, "", 0.0, 0.0, 0.0, reasons)

    common = [pair(i, j, "image_text") for i in range(20) for j in range(20) if i != j for _ in range(6)]
    rare = pair(3, 7, "image_text", "text_text")
    chosen = choose([*common, rare], 12)
    assert len(chosen) == len({frozenset(promotion[:2]) for promotion in chosen}) == 12
    assert rare in chosen
    assert chosen == choose([*common, rare], 12)
    assert choose([rare, pair(7, 3, "image_text")], 12) == [rare]
    assert len(choose([pair(3, 7, "image_text"), pair(7, 3, "text_text")], 12)) == 2


def test_fff_draws_them_and_other_methods_do_not(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    found = {}
    for method in ("fff", "finetune"):
        monkeypatch.setattr(sys, "argv", ["clipfix", f"method={method}", "--cfg", "job"])
        main()
        found[method] = yaml.safe_load(capsys.readouterr().out)["callbacks"]
    assert found["fff"].keys() - found["finetune"].keys() == {"promoted"}
    written = yaml.safe_load((CONF / "callbacks" / "fff.yaml").read_text())["promoted"]
    assert found["fff"]["promoted"] == written
    assert isinstance(instantiate(written | {"folder": str(tmp_path)}), Promoted)
