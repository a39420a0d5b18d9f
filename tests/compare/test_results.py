"""Which files compare, and which do not."""

import json

import pytest
from runs import RECIPE, SETTINGS, run

from clipfix.results.compare.results import check_comparable, find, group, read


def groups(*paths):
    return group([read(path) for path in paths])


def test_folders_files_and_globs_name_each_file_once(tmp_path):
    paths = [run(tmp_path / name) for name in ("a", "b")]
    assert find([str(tmp_path / "*"), str(tmp_path / "a"), str(paths[1])]) == paths
    assert find([str(tmp_path / "**/results.json")]) == paths
    with pytest.raises(ValueError, match=r"compare\.results: .*c/results\.json"):
        find([str(tmp_path / "c/results.json")])
    with pytest.raises(ValueError, match=r"^compare\.results is empty"):
        find([])


def test_runs_that_differ_only_by_seed_are_one_group(tmp_path):
    shuffled = {"method": {"steps": 10, "control": "shuffled"}, "wise": None}
    longer = {"method": {"steps": 20, "control": None}, "wise": None}
    paths = [
        run(tmp_path / "b1", seed=1),
        run(tmp_path / "c0", seed=0, control="shuffled", recipe=shuffled),
        run(tmp_path / "b0", seed=0),
        run(tmp_path / "d0", seed=0, recipe=longer),
        run(tmp_path / "e0", seed=0, method="fff"),
    ]
    found = groups(*paths)
    told = ["diva tiny, steps=10", "diva tiny, control: shuffled", "diva tiny, steps=20", "fff tiny"]
    assert [one.name for one in found] == told
    assert [one.seeds for one in found] == [[0, 1], [0], [0], [0]]
    assert [one.name for one in groups(*paths[:2])] == ["diva tiny", "diva tiny, control: shuffled"]


def test_recipes_that_differ_in_much_are_told_apart_by_letters(tmp_path):
    recipes = [{"method": {"steps": n, "lr": n / 10, "draws": n}, "wise": None} for n in (1, 2)]
    paths = [
        run(tmp_path / "b0", recipe=recipes[1]),
        run(tmp_path / "a0", recipe=recipes[0]),
        run(tmp_path / "b1", recipe=recipes[1], seed=1),
        run(tmp_path / "c0", recipe=recipes[1], control="shuffled"),
    ]
    found = groups(*paths)
    assert [one.name for one in found] == ["diva tiny A", "diva tiny B", "diva tiny, control: shuffled"]
    assert [one.differs for one in found] == [
        {"steps": 2, "lr": 0.2, "draws": 2}, {"steps": 1, "lr": 0.1, "draws": 1}, {},
    ]  # fmt: skip
    assert found[0].seeds == [0, 1]


def test_a_model_that_was_only_scored_is_named_by_it(tmp_path):
    path = run(tmp_path / "a", method=None, backbone=None, model="vit-l14.pt")
    facts = json.loads(path.read_text())
    path.write_text(json.dumps(facts | {"scores": {"score": facts["scores"]["after"]}}))
    (tmp_path / "a" / "outcomes.npz").unlink()
    (one,) = groups(path)
    assert (one.name, one.results[0].before) == ("vit-l14.pt", None)
    assert one.results[0].after["pairs/ties"] == 0


def test_one_run_twice_is_refused(tmp_path):
    paths = [run(tmp_path / name) for name in ("a", "b")]
    with pytest.raises(ValueError, match=r"a/results\.json and .*b/results\.json are both seed 0 of diva tiny"):
        groups(*paths)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": {"retrieval_long": {"files": 2, "sha256": "bb22"}}}, r"^retrieval_long .*bb22.*aa11"),
        ({"benchmarks": SETTINGS | {"pairs": SETTINGS["pairs"] | {"prefix": "a "}}}, r"^pairs .*prefix: a \)"),
        ({"benchmarks": SETTINGS | {"retrieval_long": {"text": {"key": "txt", "pick": "one"}}}}, r"text\.key: txt"),
    ],
)  # fmt: skip
def test_other_data_and_other_settings_are_refused_by_name(tmp_path, change, message):
    results = [read(run(tmp_path / "a")), read(run(tmp_path / "b", seed=1, **change))]
    with pytest.raises(ValueError, match=message):
        check_comparable(results)


def test_where_shards_lie_does_not_matter_and_silence_is_told(tmp_path):
    moved = SETTINGS | {"pairs": SETTINGS["pairs"] | {"shards": "/elsewhere/pairs-*.tar"}}
    assert check_comparable([read(run(tmp_path / "a")), read(run(tmp_path / "b", seed=1, benchmarks=moved))]) == [
        "No settings in 2 of 2 files: zeroshot, lengths."
    ]
    silent = read(run(tmp_path / "c", seed=2, data=None))
    assert "No data hash in 1 of 2 files: pairs, zeroshot, retrieval_long, lengths." in check_comparable(
        [read(run(tmp_path / "d")), silent]
    )


def test_other_items_are_refused_without_a_hash(tmp_path, monkeypatch):
    one = read(run(tmp_path / "a", data=None))
    monkeypatch.setattr("runs.PAIRS", 13)
    other = read(run(tmp_path / "b", data=None))
    with pytest.raises(ValueError, match=r"^pairs .* items .*b/results\.json"):
        check_comparable([one, other])


def test_outcomes_of_another_run_are_refused(tmp_path):
    path, other = run(tmp_path / "a", seed=0), run(tmp_path / "b", seed=1)
    (other.parent / "outcomes.npz").replace(tmp_path / "a" / "outcomes.npz")
    with pytest.raises(ValueError, match=r"outcomes\.npz gives .* for .*/.*results\.json"):
        read(path)


@pytest.mark.parametrize("text", ["not json", "[]", '{"seed": 0}', '{"scores": {}}'])
def test_what_is_no_result_file_is_refused(tmp_path, text):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(ValueError, match=r"results\.json"):
        read(tmp_path / "results.json")


def test_recipes_are_told_from_each_other_however_written(tmp_path):
    swapped = {"wise": None, "method": {"control": None, "steps": 10}}
    assert len(groups(run(tmp_path / "a", seed=0), run(tmp_path / "b", seed=1, recipe=swapped))) == 1
    assert swapped == RECIPE
