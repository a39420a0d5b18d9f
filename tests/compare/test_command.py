"""The front door: python -m clipfix run=compare."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from runs import run
from wandb_runs import stored

from clipfix.__main__ import main
from clipfix.cli.command import expand_short_forms
from clipfix.results.record import Record
from clipfix.results.workspace import workspace


@pytest.fixture
def clipfix(tmp_path, monkeypatch, capsys):
    """Runs the command in an empty folder; returns what was printed."""
    monkeypatch.chdir(tmp_path)

    def command(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["clipfix", *arguments])
        monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)  # `main` sets it
        main()
        return capsys.readouterr().out

    return command


def test_files_folders_and_globs_are_words_behind_the_verb(clipfix, tmp_path):
    run(tmp_path / "it's one" / "0", seed=0)
    run(tmp_path / "it's one" / "method=diva,seed=1", seed=1)
    run(tmp_path / "fff", method="fff")
    words = ["it's one/0/results.json", "it's one/method=diva,seed=1", "f*"]
    printed = clipfix("run=compare", *words, "logger=csv", "compare.resamples=50", "compare.examples=0")
    assert max(map(len, printed.splitlines())) <= 80
    lines = printed.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("pairs "))
    assert [line[len("pairs") :].split()[0] for line in lines[first : first + 2]] == ["1", "2"]
    assert lines[first + 2].split()[:3] == ["2", "-", "1"]  # the difference of the two groups
    assert {"1  diva tiny, 2 seeds", "2  fff tiny, 1 seed"} <= set(lines)
    assert "No settings in 3 of 3 files: zeroshot, lengths." in printed
    (page,) = tmp_path.glob("outputs/compare/*/report.html")
    assert str(page.relative_to(tmp_path)) in printed
    text = (page.parent / "scores.txt").read_text()
    assert "presence of specific features" in text
    assert "difference, second - first" in text
    assert "diva tiny: 2 runs, seeds 0, 1." in page.read_text()
    assert {path.name for path in page.parent.iterdir()} == {
        "report.html",
        "scores.txt",
        "radar.png",
        "forgetting.png",
        "lengths.png",
    }


def test_without_paths_the_last_two_runs_are_compared(clipfix, tmp_path):
    """Whatever their names, and whatever earlier comparisons and runs without scores lie there."""
    for age, name in enumerate(("z/new", "sweeps/a/0", "b/old")):
        path = run(tmp_path / "outputs" / name, seed=age)
        os.utime(path, (1_000_000 - age, 1_000_000 - age))
    Record(scores={"before": {}, "after": {}}).write(tmp_path / "outputs" / "z")
    printed = clipfix("run=compare", "logger=csv", "compare.resamples=20", "compare.examples=0")
    assert re.findall(r"outputs/(\S+)$", printed, re.MULTILINE)[:2] == ["sweeps/a/0", "z/new"]
    (page,) = tmp_path.glob("outputs/compare/*/report.html")
    assert "diva tiny: 2 runs, seeds 0, 1." in page.read_text()


@pytest.mark.slow
def test_pictures_go_to_wandb(tmp_path):
    """In a process of its own: W&B remembers what other tests of this one told it."""
    for seed in (0, 1):
        run(tmp_path / f"a{seed}", seed=seed)
    words = ["run=compare", "a0", "a1", "compare.resamples=20", "compare.examples=0"]
    subprocess.run([sys.executable, "-m", "clipfix", *words], cwd=tmp_path, check=True, capture_output=True)
    logged = sorted(tmp_path.glob("outputs/compare/*/wandb/offline-run-*/files/media/images/compare/*.png"))
    assert [path.name.split("_")[0] for path in logged] == ["forgetting", "lengths", "radar"]
    with Image.open(logged[0]) as image:
        assert min(image.size) > 400
    kept = stored(logged[0].parents[6])
    assert kept.config["compare"]["results"] == ["a0", "a1"]
    assert kept.names() == {"compare/forgetting", "compare/lengths", "compare/radar"}
    assert kept.media("compare/forgetting") == [logged[0]]
    (section,) = (each for each in workspace("me", "clipfix", [], [], None).sections if each.name == "compare")
    assert kept.names() <= {key for panel in section.panels for key in panel.media_keys}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a", "nowhere"], "compare.results: nowhere does not exist."),
        ([], "compare.results is empty: give result files, as in run=compare outputs/*/*/results.json"),
        (["a", "other"], "pairs was scored on different data in other/results.json"),
    ],
)
def test_what_does_not_compare_is_answered_in_one_line(words, message, clipfix, tmp_path):
    run(tmp_path / "a")
    run(tmp_path / "other", seed=1, data={"pairs": {"files": 1, "sha256": "bb22"}})
    with pytest.raises(SystemExit) as exit_:
        clipfix("run=compare", *words)
    assert str(exit_.value.code).startswith(f"clipfix: {message}")
    assert not list(tmp_path.glob("outputs/compare/*"))


def test_other_verbs_get_their_words_as_they_are():
    assert expand_short_forms(["run=fit", "seed=1", "oops"]) == ["run=fit", "seed=1", "oops"]
    assert expand_short_forms(["run=compare", "seed=1"]) == ["run=compare", "seed=1"]


def test_it_starts_without_torch():
    """A table of a few files must not wait for what trains models."""
    rooms = ", ".join(f"clipfix.results.compare.{name}" for name in ("results", "page", "figures"))
    code = f"import sys, {rooms}; print('torch' in sys.modules)"
    environment = {"PYTHONPATH": str(Path(__file__).parents[2] / "src"), "PATH": ""}
    asked = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert asked.stdout.strip() == "False"
