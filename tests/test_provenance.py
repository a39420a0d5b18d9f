"""What result files say of weights, data and code."""

from pathlib import Path

import pytest
import torch
from architectures import transformers_clip
from torch import nn

from clipfix.evals.probes import Probes
from clipfix.evals.retrieval import Retrieval
from clipfix.models.clip import Backbone, weights_hash
from clipfix.results import provenance
from clipfix.training.checkpoints import load_repair

TEXT = {"key": "txt", "pick": "one"}


def write(path: Path, words: str = "a") -> str:
    """A file; what is asked here never looks into it."""
    path.write_text(words)
    return str(path)


def test_the_same_weights_hash_alike_from_whatever_file(vocabulary, tmp_path):
    transformers_clip(tmp_path / "transformers", vocabulary)
    from_transformers = Backbone(str(tmp_path / "transformers"))
    folder = from_transformers.save(tmp_path / "open_clip", torch.float32)
    from_open_clip = Backbone(str(folder))
    torch.save(
        {"state_dict": {f"backbone.{name}": weight for name, weight in from_open_clip.state_dict().items()}},
        file := tmp_path / "last.ckpt",
    )
    from_checkpoint = Backbone(str(folder), "random")
    other = weights_hash(from_checkpoint.model)
    load_repair(from_checkpoint, str(file))

    hashes = {weights_hash(backbone.model) for backbone in (from_transformers, from_open_clip, from_checkpoint)}
    assert len(hashes) == 1
    assert other not in hashes
    assert weights_hash(from_open_clip.model.double()) in hashes
    from_open_clip.float().logit_scale.data += 1e-3
    assert weights_hash(from_open_clip.model) not in hashes
    swapped, weights = nn.ParameterDict({"a": nn.Parameter(torch.ones(2)), "b": nn.Parameter(torch.zeros(2))}), []
    for names in (("a", "b"), ("b", "a")):
        swapped["a"], swapped["b"] = (swapped[name] for name in names)
        weights.append(weights_hash(swapped))
    assert weights[0] != weights[1]


def test_the_data_hash_is_of_contents(tmp_path):
    shards = [write(tmp_path / f"{i}.tar", f"picture {i}") for i in range(2)]
    first = provenance.data_hash({"shards": shards})
    assert first["files"] == 2
    (tmp_path / "elsewhere").mkdir()
    for shard in shards:
        Path(shard).rename(tmp_path / "elsewhere" / Path(shard).name)
    moved = str(tmp_path / "elsewhere")
    assert provenance.data_hash({"shards": moved}) == first
    file = tmp_path / "elsewhere" / "1.tar"
    changed = bytearray(file.read_bytes())
    changed[-1] ^= 1
    file.write_bytes(changed)
    assert provenance.data_hash({"shards": moved})["sha256"] != first["sha256"]
    remote = "https://example.org/{0..2}.tar"
    assert provenance.data_hash({"shards": [str(file), remote]}) == {
        "files": 4,
        "sha256": None,
        "urls": [f"https://example.org/{i}.tar" for i in range(3)],
    }


def test_another_source_names_its_own_files(tmp_path):
    class Folder:
        def files(self):
            return [str(tmp_path / "a.csv")]

    (tmp_path / "a.csv").write_text("1")
    before = provenance.data_hash({"shards": Folder()})
    (tmp_path / "a.csv").write_text("23")
    assert provenance.data_hash({"shards": Folder()}) != before


def test_no_score_on_what_the_run_has_seen(tmp_path):
    test, train = (write(tmp_path / f"{name}.tar") for name in ("test", "train"))
    (tmp_path / "link.tar").symlink_to(test)
    benchmarks = {"retrieval": Retrieval(test, TEXT, [1]), "probes": Probes(train, test, ["shape"], [1.0])}
    provenance.check_splits(benchmarks, {"data.train": [train], "data.selection": [None]})  # a probe is fitted there
    for source in (test, [train, test], str(tmp_path / "t*.tar"), str(tmp_path / "link.tar")):
        with pytest.raises(ValueError, match=r"eval\.benchmarks\.retrieval .*test\.tar, .*data\.selection "):
            provenance.check_splits(benchmarks, {"data.train": [train], "data.selection": [source]})


def test_the_facts_hold_no_path_of_this_machine(clip_folder, tmp_path):
    shard = write(tmp_path / "test.tar")
    facts = provenance.facts(Backbone(clip_folder, "random"), {"retrieval": Retrieval(shard, TEXT, [1])})
    assert clip_folder.endswith(facts["model"])
    assert not facts["model"].startswith("/")
    assert facts["data"]["retrieval"]["files"] == 1
    assert torch.__version__.startswith(facts["versions"]["torch"])  # which may name its build
    assert facts["device"] == "cpu"


def test_the_commit_is_that_of_a_checkout_and_of_no_other(monkeypatch, tmp_path):
    said = provenance.commit()
    if (Path(__file__).parents[1] / ".git").exists():
        assert len(said["hash"]) == 40
        assert isinstance(said["dirty"], bool)
    monkeypatch.setattr(provenance, "PACKAGE", tmp_path / "src" / "clipfix")
    assert provenance.commit() is None
