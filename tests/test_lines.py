"""Lines that say how to write what was meant: paths to quote, shards that are absent, members out of order."""

import shlex
import tarfile

import pytest
from front_door import refusal
from hydra.core.override_parser.overrides_parser import OverridesParser
from shards import encoded, pack, picture

from clipfix.annotate.work import Draft
from clipfix.data.decoding import samples
from clipfix.data.shards import expand, read_shard
from clipfix.data.texts import sentences
from clipfix.evals.embed import apart
from clipfix.results.compare.examples import read_samples
from clipfix.system.files import add_sample


@pytest.mark.parametrize(
    "path", ["/x/a=b.tar", "/x/a,b.tar", "/x/[a].tar", "/x/ä/日本.tar", "/x/(a).tar", "/x/a [b], c.tar"]
)
def test_the_message_shows_the_quotes_that_a_path_needs(path, clipfix):
    message = refusal(clipfix, f"data.train={path}", "eval=none")
    shown = message.partition("single ones: ")[2].partition(" (a list")[0]
    (word,) = shlex.split(shown)  # what the shell makes of it
    (override,) = OverridesParser.create().parse_overrides([word])
    assert (override.key_or_group, override.value()) == ("data.train", path)


def test_of_a_range_with_holes_the_shards_that_exist_can_be_asked_for(tmp_path):
    for number in (0, 2, 5):
        pack(tmp_path / f"{number:05d}.tar", {"a": {"txt": b"a"}})
    with pytest.raises(ValueError, match=r"7 of 10 shards .* first .*00001\.tar.* ask for the 3 that exist") as error:
        expand(f"{tmp_path}/{{00000..00009}}.tar")
    pattern = str(error.value).rpartition("exist: '")[2].rstrip("'")
    assert len(expand(pattern)) == 3
    with pytest.raises(ValueError, match=r"correct data\.train or data\.selection$"):
        expand(f"{tmp_path}/none-{{00000..00009}}.tar")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Dr. Smith holds a 3.5 in. disk.", ["Dr. Smith holds a 3.5 in. disk."]),
        ("A dog. A cat. ", ["A dog", "A cat", ""]),
        ("a dog runs. a cat sits.", ["a dog runs", "a cat sits."]),
        ("It is 3 in. The cat is 12 lb. heavy.", ["It is 3 in", "The cat is 12 lb. heavy."]),
        ("He walks in. the dog waits.", ["He walks in", "the dog waits."]),
        (
            "J. R. Smith, e.g. on St. Mark's square. No. 5 is red.",
            ["J. R. Smith, e.g. on St. Mark's square", "No. 5 is red."],
        ),
        ("Said yes. Vs. no", ["Said yes", "Vs", "no"]),
    ],
)
def test_abbreviations_end_no_sentence(text, found):
    assert sentences(text) == found


def test_members_out_of_order_are_named_once(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for suffix in ("jpg", "txt"):
            for key in "abc":
                add_sample(tar, key, {suffix: b"x"})
    told = []
    assert len(list(read_shard(str(tmp_path / "0.tar"), lambda _, error: told.append(str(error))))) == 3
    (line,) = told
    assert "the members of the sample 'a' are not next to each other" in line
    assert "tar --sort=name" in line


def test_samples_of_one_key_stay_apart(tmp_path):
    """As in shards that each count from zero."""
    for shard in range(3):
        pack(tmp_path / f"{shard}.tar", {"0": {"png": encoded(picture(shard)), "txt": f"{shard}".encode()}})
    found = [sample["key"] for sample in apart(samples(str(tmp_path)))]
    assert found == ["0", "0 (2)", "0 (3)"]
    asked = {"shards": str(tmp_path), "text": {"key": "txt", "pick": "one"}}
    assert {key: one["texts"] for key, one in read_samples(asked, {"0", "0 (3)"}).items()} == {
        "0": ["0"],
        "0 (3)": ["2"],
    }


def test_an_annotated_shard_joins_no_samples(tmp_path):
    """What lay between two samples of one key may be left out."""
    draft = Draft(tmp_path, "0", "pipe:x.tar")
    for text in (b"first", b"second"):
        draft.add({"__key__": "a", "__url__": "x", "txt": text})
    draft.finish(None)
    assert [raw["txt"] for raw in read_shard(str(tmp_path / "0.tar"))] == [b"first", b"second"]
