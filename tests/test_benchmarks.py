"""What the benchmarks compare is what they say; and the command for a GPU runs, with tiny shapes, on a CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import diva
import gpu
import longclip
import pytest
import torch
from small import batch, build
from torch import nn

ROOT = Path(__file__).parents[1]


def test_sd21_base_has_the_published_sizes():
    with torch.device("meta"):
        unet, vae, text = diva.sd21()
    millions = [sum(p.numel() for p in part.parameters()) / 1e6 for part in (unet, vae, text)]
    assert millions == pytest.approx([865.91, 83.65, 340.39], abs=0.01)


def test_plain_diva_has_the_loss_and_gradient_of_diva(clip_folder, generator_folder):
    fast = build("diva", clip_folder, generator_folder)
    plain = build("diva", clip_folder, generator_folder, _target_="diva.PlainDIVA")
    losses = [diva.stepper(method, diva.pictures(method, 2, stored=False), False)() for method in (fast, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    torch.testing.assert_close(diva.gradient(fast), diva.gradient(plain), atol=1e-6, rtol=1e-3)


def test_plain_longclip_has_the_loss_and_gradient_of_longclip(clip_folder):
    fast = build("longclip", clip_folder, "no generator")
    plain = build("longclip", clip_folder, "no generator", _target_="longclip.PlainLongCLIP")
    losses = [longclip.stepper(method, batch(8), bf16=False)() for method in (fast, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    torch.testing.assert_close(longclip.gradient(fast), longclip.gradient(plain), atol=1e-6, rtol=1e-3)


def test_the_plain_way_has_torchs_own_attention():
    method = longclip.build(longclip.PlainLongCLIP, "tiny", "cpu", components=2)
    kinds = {type(module) for module in method.modules() if isinstance(module, nn.MultiheadAttention)}
    assert kinds == {nn.MultiheadAttention}


def run(folder: Path, *words: str, root: Path = ROOT) -> dict:
    """The results of `gpu.py --small`; without git, as in a plain folder."""
    environment = os.environ | {"PYTHONPATH": "src", "GIT_DIR": str(folder)}
    command = [sys.executable, "benchmarks/gpu.py", "--small", "--output", str(folder), *words]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, cwd=root, env=environment)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "in all" in ended.stdout.splitlines()[-1]
    return json.loads((folder / "results.json").read_text())


def test_the_limits_of_all_parts_are_about_eight_minutes():
    assert sum(part.seconds for part in gpu.PARTS.values()) < 10 * 60  # the usual sum is 7.5: RESULTS.md


def test_parts_that_need_little_run_small(tmp_path):
    found = run(tmp_path, "--parts", "fff", "contrastive")
    assert {name: part["ended"] for name, part in found["parts"].items()} == {"fff": "done", "contrastive": "done"}
    names = [row["name"] for row in found["parts"]["contrastive"]["rows"]]
    assert names == ["plain, fp32", "chunked, fp32"]
    assert all(row["milliseconds"] > 0 for part in found["parts"].values() for row in part["rows"])
    assert found["device"] == "CPU"


def test_a_part_that_fails_or_takes_too_long_leaves_the_others(tmp_path):
    wrong = gpu.Part("-c 1/0", "-c 1/0", 10)
    slow = gpu.Part("-c __import__('time').sleep(99)", "", 1)
    assert gpu.run("tests", wrong, tmp_path, small=False, more=[])["ended"] == "failed with 1"
    assert gpu.run("tests", slow, tmp_path, small=False, more=[])["ended"] == "stopped after 1 s"


def test_rows_of_diva_add_switches(capsys):
    words = ["step", "--batch", "2", "--repeats", "1", "--device", "cpu"]
    diva.main(words)
    names = [line.partition("'name': '")[2].partition("'")[0] for line in capsys.readouterr().out.splitlines()]
    rows = ["plain", "clipfix", "+ stored latents"]
    assert [name for name in names if name.endswith("batch 2")] == [f"{row}, batch 2" for row in rows]


@pytest.mark.slow
def test_all_parts_run_small(tmp_path):
    """106 s on two cores."""
    found = run(tmp_path)
    assert {part["ended"] for part in found["parts"].values()} == {"done"}
    rows = {row["name"] for part in found["parts"].values() for row in part["rows"]}
    assert {"plain, batch 8", "clipfix, batch 8", "+ stored latents, batch 2", "training"} <= rows
