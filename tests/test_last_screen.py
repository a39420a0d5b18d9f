"""The end of a run: what it prints last, and the files that it points to."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from runs import answers, percentages, run

from clipfix.evals.base import Scores
from clipfix.evals.retrieval import Retrieval
from clipfix.results import report
from clipfix.results.compare.results import group, read
from clipfix.results.compare.rows import rows
from clipfix.results.headlines import MOST, choose, headlines, picture
from clipfix.results.record import Record

HOW = {"table": "headlines", "pictures": False, "resamples": 50, "coverage": 0.95}
SMALL = [
    "trainer=cpu", "data.prepare.train=16", "data.prepare.selection=8", "data.prepare.test=24",
    "data.prepare.pairs_train=1", "data.prepare.pairs_selection=1", "data.prepare.pairs_test=2",
    "data.prepare.summaries_test=1", "data.prepare.processes=1", "data.batch_size=8", "data.workers=0",
    "data.shuffle=0", "method=finetune", "method.steps=1", "method.schedule.warmup_steps=0",
    *(f"~eval.benchmarks.{name}" for name in ("pairs_local", "probes", "retrieval_long_alike", "lengths")),
]  # fmt: skip


def scored(right: float, seed: int) -> dict[str, Scores]:
    """Scores by several benchmarks, with their outcomes: about this share of all items right."""
    outcomes = answers(right, seed)
    found = {name: Scores({}, one) for name, one in outcomes.items()}
    for name, value in percentages(outcomes).items():
        _, benchmark, metric = name.split("/")
        found[benchmark].values[metric] = value
    return found


BOTH = {"before": scored(0.5, 999), "after": scored(0.6, 1000)}


def record(columns: dict[str, dict[str, Scores]], **facts) -> Record:
    scores = {
        column: {f"eval/{name}/{metric}": value for name, each in one.items() for metric, value in each.values.items()}
        for column, one in columns.items()
    }
    return Record(scores=scores, step=2, seed=0, seconds=61.4, peak_memory_gb=1.27, **facts)


def test_a_benchmark_has_its_mean_or_its_first_metric_and_the_methods_own_comes_first():
    values = {"lengths": {"20": 1.0, "77": 2.0}, "pairs": {"text": 1.0, "mean": 2.0, "ties": 0.0}, "empty": {}}
    values |= {f"more{i}": {"mean": 1.0, "other": 2.0} for i in range(2)}
    heads = [("pairs", "mean"), ("lengths", "20"), ("more0", "mean"), ("more1", "mean")]
    assert choose(values, "pairs") == [heads[0], ("pairs", "text"), *heads[1:]]  # filled up to five, without ties
    assert choose(values | {"more2": {"mean": 1.0}}, "pairs") == [*heads, ("more2", "mean")]
    many = {f"b{i}": {"mean": 1.0} for i in range(40)}
    assert choose(many, "b39") == [(f"b{i}", "mean") for i in (39, *range(MOST - 1))]
    assert choose({}, None) == []


def test_changes_and_intervals_are_those_of_compare(tmp_path):
    """Of the same run, read from its files."""
    of_files = {
        (row.benchmark, row.metric): row.cells[0] for row in rows(group([read(run(tmp_path / "a"))]), [], 200, 0.9, 3)
    }
    found = headlines(BOTH, "retrieval_long", 200, 0.9, 3)
    assert found[0].benchmark == "retrieval_long"
    assert {one.benchmark for one in found} == set(BOTH["after"])
    for one in found:
        cell = of_files[one.benchmark, one.metric]
        assert cell is not None
        assert one.change.interval == pytest.approx(cell.interval)
        assert (one.change.mean, one.values[0]) == (pytest.approx(cell.mean), pytest.approx(cell.before))


def test_a_score_alone_has_an_interval_and_one_without_outcomes_none():
    columns = {"score": scored(0.5, 1) | {"voc": Scores({"mean_average_precision": 40.0})}}
    found = {one.benchmark: one for one in headlines(columns, None, 100, 0.95, 0)}
    low, high = found["pairs"].change.interval
    assert low < found["pairs"].values[0] < high
    assert found["voc"].change.interval is None


@pytest.mark.parametrize("columns", [BOTH, {"score": BOTH["after"]}], ids=["fit", "eval"])
def test_the_screen_ends_in_scores_files_and_fits_80_columns(columns, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    long = {column: one | {"of_a_very_long_name_indeed": Scores({"a_metric_longer_than_a_column": 100.0})} for column, one in columns.items()}  # fmt: skip  # noqa: E501
    folder = Path("outputs/finetune-tiny/2026-01-01_00-00-00")
    folder.mkdir(parents=True)
    report.write(folder.resolve(), long, {}, record(long), first="pairs", **HOW)
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert max(map(len, lines)) <= 80
    assert f"Run folder: {folder}" in lines
    heads = [line for line in lines if re.search(r"\d \.|\d\.\d", line) and "Time" not in line]
    assert 5 <= len(heads) <= 8
    after = columns[list(columns)[-1]]
    assert re.match(rf"pairs +mean .*{after['pairs'].values['mean']:.1f}", heads[0])
    assert printed.index(heads[-1]) < printed.index("Run folder")
    for name in re.findall(r"^  (\S+\.\w+)", printed, re.MULTILINE):
        assert (folder / name).is_file(), name
    table = (folder / "scores.txt").read_text()
    assert all(metric.replace("_", " ") in table for one in after.values() for metric in one.values)
    assert not list(folder.glob("*.png"))


def test_the_full_table_is_a_switch_and_fits_80_columns(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    long = {
        column: one | {"a_benchmark_of_a_long_name": Scores({"structural_and_physical_characteristics": 99.9})}
        for column, one in BOTH.items()
    }
    report.write(tmp_path, long, {}, record(long), **HOW)
    assert "viewpoint" not in capsys.readouterr().out
    report.write(tmp_path, long, {}, record(long), **HOW | {"table": "full"})
    table = capsys.readouterr().out.split("Run folder")[0].splitlines()
    assert any("viewpoint" in line for line in table)
    assert max(map(len, table)) <= 80
    rows = [line for line in table if re.search(r"\d\.\d", line)]
    assert len(rows) == sum(len(one.values) for one in long["after"].values())  # one line each: nothing wraps


def test_without_scores_no_table_and_no_picture_of_them(tmp_path, capsys):
    nothing: dict = {"before": {}, "after": {}}
    report.write(tmp_path, nothing, {}, record(nothing), **HOW | {"pictures": True})
    printed = capsys.readouterr().out
    assert "scores." not in printed
    assert "before" not in printed
    assert not list(tmp_path.glob("scores*"))
    assert Record.read(tmp_path / "results.json").scores == nothing


def test_the_picture_fits_a_laptop(tmp_path):
    columns = {
        when: {f"a_benchmark_with_a_long_name_{i}": Scores({"and_a_long_metric_too": 100.0 * i}) for i in range(9)}
        for when in ("before", "after")
    }
    found = headlines(columns, None, 10, 0.95, 0)
    path = report.save(picture(found, list(columns)), tmp_path / "scores.png")
    with Image.open(path) as image:
        assert 600 < image.width <= 1400
        assert 300 < image.height <= 900
    assert picture([], ["before"]) is None


def test_the_next_command_compares_two_runs_that_compare_and_else_exports(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = run(Path("outputs/a/0"), seed=0).parent
    found = record(BOTH, weights={"before": "1", "after": "2"}, checkpoint="checkpoints/best.ckpt")
    assert "".join(report.next_command(first, found)).endswith(f"{first}/checkpoints/best.ckpt")
    second = run(Path("outputs/b/0"), seed=1).parent
    assert "run=compare" in report.next_command(second, found)[0]
    third = run(Path("outputs/b/1"), seed=1).parent  # the same seed once more: compare refuses it
    assert "run=export" in report.next_command(third, found)[0]
    unchanged = record(BOTH, weights={"before": "1", "after": "1"}, checkpoint="checkpoints/best.ckpt")
    assert report.next_command(third, unchanged) == []


@pytest.mark.slow  # a fresh interpreter
def test_a_first_run_says_no_more_of_wandb_than_how_to_sync(tmp_path):
    """The command in a process of its own, where W&B may speak."""
    environment = {name: value for name, value in os.environ.items() if name != "WANDB_SILENT"}
    words = [sys.executable, "-m", "clipfix", *SMALL, "report.pictures=false"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert "wandb" not in done.stderr
    (folder,) = (path.parent for path in tmp_path.glob("outputs/*/*/results.json"))
    (said,) = (line for line in done.stdout.splitlines() if "wandb" in line)
    command = said[said.index("wandb sync ") :].split()
    assert [path.parent for path in tmp_path.glob(command[-1])] == [folder / "wandb"]
    assert not list(folder.glob("*.png"))
    last = done.stdout[done.stdout.index("percent ") :].splitlines()
    assert last[1].startswith("pairs ")
    assert last[-2].startswith("Next: python -m clipfix run=export")
    assert max(map(len, last)) <= 80


@pytest.mark.parametrize(("key", "value"), [("report.table", "ful"), ("report.pictures", "some")])
def test_a_wrong_switch_is_refused_before_anything_is_scored(key, value, clipfix, monkeypatch):
    monkeypatch.setattr(Retrieval, "score", None)
    with pytest.raises(SystemExit) as exit_:
        clipfix(*SMALL, "logger=csv", f"{key}={value}")
    assert f"{key} is " in str(exit_.value.code)
