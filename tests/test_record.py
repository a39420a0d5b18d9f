"""results.json: what is written is read, and files of older versions are still read."""

import json
from dataclasses import fields
from pathlib import Path

import pytest

from clipfix.results.record import Record
from clipfix.system import moved

STORED = sorted((Path(__file__).parents[1] / "benchmarks" / "results").glob("*/results.json"))


def test_what_is_written_is_read(tmp_path):
    record = Record(model="tiny/clip", step=3, wise=0.7, scores={"before": {"eval/a/b": 1.5}, "after": {"eval/a/b": 2}})
    assert vars(Record.read(record.write(tmp_path))) == vars(record)


@pytest.mark.parametrize("path", STORED, ids=lambda path: path.parent.name)
def test_the_files_of_the_tables_keep_their_keys(path, tmp_path):
    """Not only read: written again they are the same, key by key, but for the classes that have moved since."""
    assert json.loads(Record.read(path).write(tmp_path).read_text()) == moved.current(json.loads(path.read_text()))


def test_a_file_of_another_version_lacks_keys_and_has_others(tmp_path):
    (tmp_path / "results.json").write_text(json.dumps({"seed": 1, "mood": "good", "scores": {"score": {}}}))
    record = Record.read(tmp_path / "results.json")
    assert (record.seed, record.method, record.has_scores) == (1, None, False)
    assert record.facts() == {"seed": 1}
    assert not hasattr(record, "mood")


@pytest.mark.parametrize("text", ["not json", "[]", '{"seed": 0}', '{"scores": {"score": {"eval/a/b": "high"}}}'])
def test_another_file_is_refused_by_name(text, tmp_path):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(ValueError, match=r"results\.json"):
        Record.read(tmp_path / "results.json")


def test_a_checkpoint_finds_the_record_of_its_run(tmp_path):
    checkpoint = tmp_path / "run" / "checkpoints" / "best.ckpt"
    checkpoint.parent.mkdir(parents=True)
    assert Record.of_checkpoint(str(checkpoint)) is None
    Record(seed=5, scores={"after": {"eval/a/b": 1.0}}).write(tmp_path / "run")
    found = Record.of_checkpoint(str(checkpoint))
    assert found is not None
    assert (found.seed, found.has_scores) == (5, True)
    assert {field.name for field in fields(found)} >= {"scores", "weights", "recipe"}
