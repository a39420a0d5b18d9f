"""A new method is three files: it trains, is scored, and comes back from its checkpoint without an edit elsewhere.

One toy of each kind in tests/toys: pairs; labelled images with a cache and no steps; episodes.
"""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from shards import encoded, pack

TOYS = Path(__file__).parent / "toys" / "conf"
RUN = [
    f"hydra.searchpath=[file://{TOYS}]", "logger=csv", "trainer=cpu", "report.pictures=false",
    "trainer.log_every_n_steps=1", "trainer.val_check_interval=null", "world=none",
]  # fmt: skip


@pytest.fixture
def shards(tmp_path) -> dict[str, str]:
    """Dark and bright pictures, some to train on and some to score."""

    def write(name: str, first: int) -> str:
        grey = [(20 + 3 * (first + i) if i % 2 == 0 else 200 + 3 * (first + i)) for i in range(8)]
        pictures = {
            f"{i}": {
                "png": encoded(Image.new("RGB", (40, 40), (value, value, value))),
                "txt": "a dark picture" if i % 2 == 0 else "a bright picture",
                "json": {"label": i % 2},
            }
            for i, value in enumerate(grey)
        }
        return str(pack(tmp_path / f"{name}.tar", pictures))

    return {"train": write("train", 0), "test": write("test", 8)}


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def test_a_method_on_pairs(clipfix, shards, clip_folder):
    folder, _ = clipfix(
        *RUN, "method=toy_pairs", "backbone=folder", f"backbone.name={clip_folder}", "backbone.pretrained=random",
        "data=shards", f"data.train={shards['train']}", "data.batch_size=4", "data.workers=0", "eval=none",
    )  # fmt: skip
    saved = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["state_dict"].keys() == {"layer.weight"}
    assert results(folder)["method"] == "pairs"
    header = (folder / "metrics.csv").read_text().splitlines()[0]
    assert {"train/contrastive", "toy/norm"} <= set(header.split(","))


def test_a_cache_without_steps(clipfix, shards, clip_folder):
    backbone = ["backbone=folder", f"backbone.name={clip_folder}", "backbone.pretrained=random"]
    scored = ["eval=toy_labelled", f"eval.benchmarks.few_shot.shards={shards['test']}"]
    data = ["data=toy_labelled", f"data.train={shards['train']}"]
    folder, _ = clipfix(*RUN, "method=toy_cache", *backbone, *data, *scored)
    found = results(folder)["scores"]
    assert found["before"]["eval/few_shot/accuracy"] == 50.0  # texts of random towers; the cache is empty
    assert found["after"]["eval/few_shot/accuracy"] == 100.0
    saved = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["state_dict"].keys() == {"model.keys", "model.values"}
    assert saved["state_dict"]["model.values"].sum(0).tolist() == [2, 2]
    again, _ = clipfix(
        *RUN, "run=eval", "method=toy_cache", *backbone, *scored, f"checkpoint={folder}/checkpoints/last.ckpt"
    )
    assert again != folder
    assert results(again)["scores"]["score"]["eval/few_shot/accuracy"] == 100.0
    with pytest.raises(SystemExit, match="Backbone has no classifier"):
        clipfix(*RUN, "run=eval", *backbone, *scored)


def test_a_method_on_episodes(clipfix, shards, clip_folder):
    backbone = ["backbone=folder", f"backbone.name={clip_folder}", "backbone.pretrained=random"]
    scored = ["eval=toy_episodes", f"eval.benchmarks.episodes.shards={shards['test']}"]
    data = ["data=toy_episodes", f"data.train={shards['train']}"]
    folder, _ = clipfix(*RUN, "method=toy_episodes", *backbone, *data, *scored)
    saved = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 3
    weight = saved["state_dict"]["model.layer.weight"]
    assert not torch.equal(weight, torch.eye(len(weight)))
    assert saved["state_dict"].keys() == {"model.layer.weight"}
    after = results(folder)["scores"]["after"]["eval/episodes/accuracy"]
    again, _ = clipfix(
        *RUN, "run=eval", "method=toy_episodes", *backbone, *scored, f"checkpoint={folder}/checkpoints/last.ckpt"
    )
    assert results(again)["scores"]["score"]["eval/episodes/accuracy"] == after
