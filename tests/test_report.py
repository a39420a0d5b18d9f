"""What a run leaves behind, from planted numbers."""

import csv
import json

from PIL import Image

from clipfix.evals.base import Scores
from clipfix.results import report
from clipfix.results.record import Record

SCORES = {
    "before": {"eval/pairs/mean": 40.0, "eval/pairs/ties": 3.0, "eval/zeroshot/shape": 92.04},
    "after": {"eval/pairs/mean": 52.5, "eval/pairs/ties": 0.0, "eval/zeroshot/shape": 92.0},
}


def scored(columns: dict) -> dict:
    """The same, as benchmarks return it."""
    found: dict = {column: {} for column in columns}
    for column, scores in columns.items():
        for name, value in scores.items():
            _, benchmark, metric = name.split("/")
            found[column].setdefault(benchmark, Scores({})).values[metric] = value
    return found


def printed(scores: dict) -> list[list[str]]:
    columns = [[str(cell) for cell in column.cells] for column in report.full_table(scores).columns]
    return [list(row) for row in zip(*columns, strict=True)]


def test_table_names_each_benchmark_once_and_shows_the_change():
    assert printed(SCORES) == [
        ["pairs", "mean", "40.0", "52.5", "+12.5"],
        ["", "ties (count)", "3.0", "0.0", "-3.0"],
        ["zeroshot", "shape", "92.0", "92.0", "0.0"],
    ]


def test_scores_alone_have_no_change_column():
    assert printed({"score": SCORES["before"]})[0] == ["pairs", "mean", "40.0"]


def write_part(folder, version: int, rows: list[dict]) -> None:
    part = folder / "metrics" / f"version_{version}" / "metrics.csv"
    part.parent.mkdir(parents=True)
    with part.open("w") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def test_a_resumed_start_replaces_the_steps_it_repeats(tmp_path):
    """The first start was killed after step 7 and had saved step 4; the second began at 5. Starts sort as numbers."""
    write_part(tmp_path, 2, [{"step": step, "train/loss": 1.0} for step in range(8)])
    write_part(tmp_path, 10, [{"step": step, "train/loss": 2.0, "val/loss": 3.0} for step in range(5, 9)])
    rows = report.join_metrics(tmp_path)
    assert [row["train/loss"] for row in rows] == ["1.0"] * 5 + ["2.0"] * 4
    with (tmp_path / "metrics.csv").open() as file:
        joined = list(csv.DictReader(file))
    assert [int(row["step"]) for row in joined] == list(range(9))
    assert [row["val/loss"] for row in joined] == [""] * 5 + ["3.0"] * 4


def test_training_and_validation_share_a_panel_and_one_term_is_not_drawn_twice():
    rows = [
        {"step": str(i), "train/contrastive": "1", "train/loss": "1", "val/contrastive": "2", "lr": "3"} for i in (0, 1)
    ]
    panels = {axis.get_title(): len(axis.lines) for axis in report.curves(rows).axes}
    assert panels == {"contrastive": 2}
    assert report.curves([]) is None


def test_what_a_method_watches_is_drawn_and_its_conditions_share_a_panel():
    watched = [
        "selection/pairs/mean",
        "denoising/right",
        "drift/features",
        "denoising/null",
        "denoising/shuffled",
        "mood/of_a_new_method",
    ]
    rows = [{"step": str(i)} | dict.fromkeys([*watched, "train/loss", "lr-SGD", "data/skipped"], "1") for i in (0, 1)]
    panels = {axis.get_title(): len(axis.lines) for axis in report.curves(rows).axes}
    assert panels == {
        "loss": 1,
        "denoising, by condition": 3,
        "drift/features": 1,
        "mood/of a new method": 1,
        "selection/pairs/mean": 1,
    }
    assert next(iter(panels)) == "loss"


def test_write_leaves_numbers_and_pictures(tmp_path, capsys):
    write_part(tmp_path, 0, [{"step": 0, "train/loss": 1.0}])
    record = Record(seed=3, seconds=4.2, peak_memory_gb=0.5, step=1, scores=SCORES)
    report.write(tmp_path, scored(SCORES), {}, record, table="headlines", pictures=True, resamples=9, coverage=0.9)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["scores"] == SCORES
    assert results["seed"] == 3
    assert results["peak_memory_gb"] > 0
    for name in ("scores", "scores_all", "curves"):
        with Image.open(tmp_path / f"{name}.png") as image:
            assert min(image.size) > 100
    assert tmp_path.name in capsys.readouterr().out
