"""Checkpoints that do not fit or are none; and docs/bad-input.md, whose rows are tests."""

import ast
import re
from pathlib import Path

import pytest
import torch

from clipfix.models.clip import Backbone
from clipfix.training.checkpoints import load_repair

ROOT = Path(__file__).parents[1]


class Writes:
    """An object whose unpickling writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_code_in_a_pickle_does_not_run(clip_folder: str, tmp_path: Path) -> None:
    torch.save({"state_dict": {}, "batches_seen": 1, "extra": Writes(tmp_path / "ran")}, tmp_path / "evil.ckpt")
    with pytest.raises(ValueError, match=r"evil\.ckpt is not a checkpoint"):
        load_repair(Backbone(clip_folder, "random"), str(tmp_path / "evil.ckpt"))
    with pytest.raises(ValueError, match=r"evil\.ckpt .*Python objects"):
        Backbone(clip_folder, str(tmp_path / "evil.ckpt"))
    assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / "evil.ckpt", weights_only=False)
    assert (tmp_path / "ran").exists(), "the pickle is harmless, so nothing was tested"


def test_a_checkpoint_of_another_size_is_refused(clip_folder: str, tmp_path: Path) -> None:
    backbone = Backbone(clip_folder, "random")
    width = {"backbone.model.visual.proj": torch.zeros(99, 99)}
    torch.save({"state_dict": width, "batches_seen": 1}, tmp_path / "other.ckpt")
    before = backbone.state_dict()["model.visual.proj"].clone()
    with pytest.raises(ValueError, match=r"other\.ckpt was trained on another backbone: .*visual\.proj") as error:
        load_repair(backbone, str(tmp_path / "other.ckpt"))
    assert "\n" not in str(error.value)
    assert torch.equal(backbone.state_dict()["model.visual.proj"], before)


def test_every_row_of_the_bad_input_table_names_a_test() -> None:
    rows = [line for line in (ROOT / "docs" / "bad-input.md").read_text().splitlines() if line.startswith("| ")][1:]
    rows = [row for row in rows if "**" not in row.split("|")[1]]
    assert len(rows) > 30
    for row in rows:
        found = re.fullmatch(r"`(\S+)::(\w+)`", row.split("|")[-2].strip())
        assert found, row
        tree = ast.parse((ROOT / found[1]).read_text())
        assert found[2] in [node.name for node in tree.body if isinstance(node, ast.FunctionDef)], row
