"""The command as it is started: help without slow imports, and the wheel in a folder of its own."""

import os
import re
import subprocess
import sys
import zipfile

from front_door import ROOT, python_m_clipfix


def test_help_is_quick_and_lists_the_groups():
    """About two seconds, which is without what takes longer to import; a clock would tell how busy the machine is."""
    command = [sys.executable, "-X", "importtime", "-m", "clipfix", "--help"]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    imported = {line.rpartition("|")[2].strip() for line in found.stderr.splitlines()}
    assert "hydra" in imported
    assert not imported & {
        "torch",
        "lightning",
        "open_clip",
        "transformers",
        "diffusers",
        "wandb",
        "matplotlib",
        "numpy",
    }
    assert all(
        re.search(rf"^{group}: ", found.stdout, re.MULTILINE) for group in ("method", "backbone", "data", "eval")
    )


def test_wheel_runs_from_any_folder(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        cwd=ROOT, check=True, capture_output=True,
    )  # fmt: skip
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        wheel.extractall(site)
    assert (site / "clipfix" / "tiny" / "clip" / "open_clip_model.safetensors").exists()
    shown = python_m_clipfix(
        "--cfg", "job", "-p", "backbone", "--resolve", cwd=elsewhere, env={**os.environ, "PYTHONPATH": str(site)}
    )
    assert str(site / "clipfix" / "tiny" / "clip") in shown.stdout, shown.stderr
