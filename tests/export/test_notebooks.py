"""The notebooks of examples/ run, each on the folder that its own first cell exports."""

import json
import re
import sys
from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest
import torch
from front_door import ROOT
from kinds import equal
from run import run
from torch.nn.functional import normalize

from clipfix.__main__ import main
from clipfix.models.clip import Backbone

TINY = ROOT / "src" / "clipfix" / "tiny" / "clip"
NOTEBOOKS = {path.stem: path for path in sorted((ROOT / "examples").glob("*.ipynb"))}


def command(path: Path) -> list[str]:
    first = json.loads(path.read_text())["cells"][0]
    assert first["cell_type"] == "markdown"
    (words,) = re.findall(r"python -m clipfix (run=export .*)\n", "".join(first["source"]))
    return words.split()


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with exports/ as the first cells write it; what Long-CLIP trains is only stretched here."""
    folder = tmp_path_factory.mktemp("examples")
    stretched = Backbone(str(TINY))
    stretched.stretch(20, 4)
    name = "model.text.positional_embedding"
    state = {f"backbone.{name}": stretched.state_dict()[name]}
    torch.save({"state_dict": state, "batches_seen": 1, "global_step": 0}, folder / "best.ckpt")
    commands = [command(path) for path in NOTEBOOKS.values()]
    plain = [words[1].removeprefix("to=") for words in commands if len(words) == 3]
    (with_checkpoint,) = (words for words in commands if len(words) == 4)
    assert with_checkpoint.pop(1) == "checkpoint=outputs/.../best.ckpt"
    with pytest.MonkeyPatch.context() as patch, chdir(folder):
        for words in (["run=export", f"to=[{','.join(plain)}]", "output=exports"],
                      [*with_checkpoint, "checkpoint=best.ckpt"]):  # fmt: skip
            patch.setattr(sys, "argv", ["clipfix", *words])
            main()
    return folder


@pytest.fixture(scope="module", params=NOTEBOOKS)
def notebook(request, exports) -> tuple[str, dict[str, Any], dict[str, Any]]:
    with chdir(exports):
        return request.param, *run(NOTEBOOKS[request.param])


def test_it_runs_and_shows_what_it_found(notebook):
    """The stored notebook has outputs of the same kinds; their numbers differ from machine to machine."""
    name, content, names = notebook
    stored = json.loads(NOTEBOOKS[name].read_text())
    assert kinds(stored) == kinds(content)
    assert "display_data" in {kind for cell in kinds(stored) for kind in cell}
    text = json.dumps(stored)
    assert len(text) < 100_000
    assert not re.search(r"/(tmp|home|root|work|Users)/|Warning", text)
    checks = {"retrieval": retrieval, "long_prompts": long_prompts, "llava": llava, "open_clip": drop_in}
    checks[name](names)


def kinds(content: dict[str, Any]) -> list[list[str]]:
    """Of each cell's outputs but for what is printed: in a test, some libraries print their log."""
    told = [[out["output_type"] for out in cell.get("outputs", ())] for cell in content["cells"]]
    return [[kind for kind in cell if kind != "stream"] for cell in told]


def retrieval(names: dict[str, Any]) -> None:
    backbone = Backbone(str(TINY)).eval()
    theirs = names["model"].encode(names["words"], convert_to_tensor=True)
    equal(theirs, backbone.encode_text(backbone.tokenize(names["words"])))
    found = names["by_part"].argmax(1).tolist()
    assert sum(index == n for n, index in enumerate(found)) >= len(found) / 2


def long_prompts(names: dict[str, Any]) -> None:
    assert len(names["tokenizer"](names["prompt"]).input_ids) > 200
    (first, second), (same, other) = names["long"], names["short"]
    assert (first != second).any()
    assert (same == other).all()


def llava(names: dict[str, Any]) -> None:
    backbone = Backbone(str(TINY)).eval()
    assert names["before"] != names["after"]
    tower = names["llava"].model.vision_tower
    equal(tower(names["pixels"]).pooler_output @ backbone.visual.proj, backbone.model.encode_image(names["pixels"]))


def drop_in(names: dict[str, Any]) -> None:
    backbone = Backbone(str(TINY)).eval()
    equal(names["texts"], normalize(backbone.encode_text(backbone.tokenize(names["names"])), dim=-1))
    assert sum(guess == n for n, guess in enumerate(names["guesses"])) >= 4  # of nine; one by chance
