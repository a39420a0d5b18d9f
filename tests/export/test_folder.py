"""Folders are there whole or not at all."""

import os
import signal

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from clipfix.export import folder as folders
from clipfix.export.folder import PROVENANCE, Weights, write, write_weights

STATE = {name: torch.rand(10, 10) for name in "abcde"}
FILES = {"part/w.safetensors": Weights(STATE), "README.md": "text\n", PROVENANCE: {"a": 1}}


def test_a_folder_is_written_whole_and_read_by_all(tmp_path):
    write(FILES, tmp_path / "new" / "out", torch.float16)
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"out"}
    stored = load_file(tmp_path / "new" / "out" / "part" / "w.safetensors")
    assert all(torch.equal(stored[name], value.half()) for name, value in STATE.items())
    with safe_open(tmp_path / "new" / "out" / "part" / "w.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert (tmp_path / "new" / "out" / "part" / "w.safetensors").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_what_fails_halfway_leaves_what_was_there(error, tmp_path, monkeypatch):
    write(FILES, tmp_path / "out", torch.float32)

    def fail(*_):
        raise error("halfway")

    monkeypatch.setattr(folders, "flush", fail)
    for name in ("out", "other"):
        with pytest.raises(error):
            write({**FILES, "README.md": "another"}, tmp_path / name, torch.float32, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "README.md").read_text() == "text\n"


def test_a_killed_process_leaves_no_half_folder(tmp_path):
    if (child := os.fork()) == 0:
        folders.flush = lambda path: os.kill(os.getpid(), signal.SIGKILL)
        write(FILES, tmp_path / "out", torch.float32)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")] == []

    [left] = tmp_path.iterdir()
    write(FILES, tmp_path / "another", torch.float32)
    write(FILES, tmp_path / "out", torch.float32)
    assert left.is_dir(), "it may be somebody's who writes just now"
    for name in (".out.00c0ffee.old", ".out.mine.part", ".outer.00c0ffee.part"):
        (tmp_path / name).mkdir()
    for path in [*tmp_path.glob(".*"), *left.rglob("*")]:
        os.utime(path, (0, 0))
    write(FILES, tmp_path / "out", torch.float32, overwrite=True)
    hidden = {path.name for path in tmp_path.iterdir() if path.name.startswith(".")}
    assert hidden == {".out.00c0ffee.old", ".out.mine.part", ".outer.00c0ffee.part"}


def test_what_is_there_is_replaced_only_when_asked_and_only_if_an_export_wrote_it(tmp_path):
    write(FILES, tmp_path / "out", torch.float32)
    with pytest.raises(ValueError, match=r"export\.overwrite=true"):
        write(FILES, tmp_path / "out", torch.float32)
    write({PROVENANCE: {"a": 2}}, tmp_path / "out", torch.float32, overwrite=True)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [PROVENANCE]
    (tmp_path / "mine").mkdir()
    with pytest.raises(ValueError, match=r"no export wrote it: give another export\.output"):
        write(FILES, tmp_path / "mine", torch.float32, overwrite=True)


def test_large_weights_come_in_parts_where_the_reader_joins_them(tmp_path):
    for name, in_parts, files in (("one", False, 1), ("many", True, 3)):
        (tmp_path / name).mkdir()
        write_weights(tmp_path / name / "model.safetensors", Weights(STATE, in_parts), torch.float32, largest=800)
        found = sorted(path.name for path in (tmp_path / name).glob("*.safetensors"))
        assert len(found) == files
    assert found[0] == "model-00001-of-00003.safetensors"
    joined = {
        key: value for part in (tmp_path / "many").glob("*.safetensors") for key, value in load_file(part).items()
    }
    assert all(torch.equal(joined[name], value) for name, value in STATE.items())
    assert (tmp_path / "many" / "model.safetensors.index.json").is_file()
