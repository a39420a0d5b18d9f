"""The real command on data of other kinds than the drawn world: stored latents, and photographs."""

import csv
import json

import pytest
from front_door import DATA, QUICK, RUN, UNDRAWN, UNSTAGED, refusal
from shards import photographs


@pytest.mark.slow  # tests/methods/test_diva.py has the same of a step
def test_diva_learns_the_same_from_stored_latents(clipfix, scenes):
    """Stored in half; the selection split has none, and its own are computed."""
    settings = [scenes, *QUICK, "eval=none", "diffusion.dtype=fp32", "trainer.val_check_interval=2"]
    clipfix("run=annotate", "annotator=latents", "annotator.output=stored", *settings)
    read = ["data.train=stored", "data.latents=latent.npz"]
    losses = []
    for extra in ([], read):
        folder, _ = clipfix("method=diva", *UNSTAGED, *UNDRAWN, *extra, *settings)
        with (folder / "metrics.csv").open() as file:
            rows = list(csv.DictReader(file))
        losses.append({name: [float(row[name]) for row in rows if row[name]] for name in ("train/loss", "val/loss")})
    assert len(losses[0]["train/loss"]) == 2
    assert losses[0]["val/loss"]
    for name, expected in losses[0].items():
        assert losses[1][name] == pytest.approx(expected, rel=1e-3)
    message = refusal(clipfix, "method=diva", *UNSTAGED, *UNDRAWN, *read, *settings, "diffusion.dtype=bf16")
    assert "stored/train-00000.tar has latents of PatchPCA" in message
    assert "run=annotate annotator=latents" in message
    assert "reads no stored latents" in refusal(clipfix, "method=finetune", *read, *settings)


@pytest.mark.parametrize(
    ("picture", "choices"),
    [
        ("retrieval", ["method=finetune", "eval=standard"]),
        pytest.param(
            "lengths",
            ["method=longclip", "eval=long", "++data.texts.long={key: caption, pick: one, k: 1}"],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_photographs_packed_by_img2dataset(picture, choices, clipfix, tmp_path, monkeypatch):
    """The main job on real pictures in a folder as img2dataset leaves it, scored by retrieval; W&B knows nobody."""
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    for split in ("train", "selection", "test"):
        photographs(tmp_path / split)
    run, _ = clipfix(
        *RUN, *DATA, "logger=wandb", "data=shards", *choices,
        "data.train=train", "data.selection=selection", "eval.shards=test",
        "data.batch_size=2", "method.steps=2", "report.pictures=true",
    )  # fmt: skip
    scores = json.loads((run / "results.json").read_text())["scores"]
    assert {value for name, value in scores["after"].items() if name.endswith("image_to_text_R@10")} == {100.0}
    assert (run / f"{picture}.png").exists()
    assert list(run.glob(f"wandb/offline-run-*/files/media/images/report/{picture}*.png"))
