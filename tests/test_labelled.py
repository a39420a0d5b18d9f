"""Draws of shots, carving of val, sentences by class, single pictures, and stored features."""

import json
import logging
import shutil
import zipfile
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image

from clipfix.data.labelled import Contents, Labelled, LabelledSet, carve, draw_shots
from clipfix.data.stored_caches import read_cache


def items(*sizes: int) -> list[Labelled]:
    """So many pictures of each class."""
    return [
        Labelled(f"{label}/{n:02d}", Path(f"{label}/{n}.jpg"), label) for label, k in enumerate(sizes) for n in range(k)
    ]


class Given(LabelledSet):
    """A set of given contents."""

    def __init__(self, contents: Contents, **settings) -> None:
        super().__init__(**{"root": ".", "templates": ["a {}"]} | settings)
        self.given = contents

    def read(self) -> Contents:
        return self.given


def given(classes=("cat", "dog"), train=None, test=None, val=None, **settings) -> Given:
    splits = {"train": items(4, 4) if train is None else train}
    splits["test"] = [Labelled("t0", Path("t0"), 0), Labelled("t1", Path("t1"), 1)] if test is None else test
    if val is not None:
        splits["val"] = val
    return Given(Contents(list(classes), splits), **settings)


# -- shots -------------------------------------------------------------------------------------------------------------


def test_shots_are_so_many_different_pictures_of_each_class_sorted_by_label():
    drawn = draw_shots(items(9, 9, 9), 4, seed=0)
    assert [item.label for item in drawn] == [0] * 4 + [1] * 4 + [2] * 4
    assert len(set(drawn)) == 12


def test_a_draw_follows_from_seed_and_keys_alone():
    there = items(9, 9, 9)
    assert draw_shots(reversed(there), 4, seed=0) == draw_shots(there, 4, seed=0)
    assert draw_shots(there, 4, seed=1) != draw_shots(there, 4, seed=0)
    assert {draw_shots(there, 1, seed=seed)[0].key for seed in range(60)} == {f"0/{n:02d}" for n in range(9)}


def test_fewer_shots_are_the_beginning_of_more():
    there = items(9, 9)
    few, many = draw_shots(there, 2, seed=3), draw_shots(there, 8, seed=3)
    assert few == many[:2] + many[8:10]


def test_a_class_with_fewer_pictures_is_filled_with_replacement_and_named_in_one_line(caplog):
    with caplog.at_level(logging.WARNING):
        drawn = draw_shots(items(9, 3), 8, seed=0, classes=["cat", "dog"])
    times = Counter(item.key for item in drawn if item.label == 1)
    assert set(times) == {"1/00", "1/01", "1/02"}
    assert sum(times.values()) == 8
    (line,) = caplog.messages
    assert line == "fewer than 8 pictures, so some are used twice: 'dog' (3)"


@pytest.mark.parametrize(
    ("there", "shots", "said"),
    [
        (items(3, 0, 3), 1, "class 1 has no picture. Labels must go from 0 to 2 without a gap"),
        (items(3), 0, "0 shots cannot be drawn: set 1 or more"),
        ([], 1, "from no pictures"),
    ],
)
def test_what_no_shots_can_be_drawn_from(there, shots, said):
    with pytest.raises(ValueError, match=said):
        draw_shots(there, shots, seed=0)


def test_a_class_without_pictures_is_named():
    with pytest.raises(ValueError, match="class 'dog' has no picture"):
        draw_shots(items(3), 1, seed=0, classes=["cat", "dog"])


# -- splits ------------------------------------------------------------------------------------------------------------


def test_carving_takes_the_share_of_each_class_and_never_a_whole_class():
    there = items(20, 10, 2, 1)
    kept, taken = carve(there, 0.2, seed=0)
    assert Counter(item.label for item in taken) == {0: 4, 1: 2, 2: 1}
    assert sorted(kept + taken) == sorted(there)
    assert carve(there, 0.2, seed=0) == (kept, taken)
    assert carve(there, 0.2, seed=1)[1] != taken


def test_val_is_carved_out_of_train_where_there_is_none_and_shots_are_apart_from_it():
    of = given(train=items(10, 10))
    train, val, test = (of.split(name) for name in ("train", "val", "test"))
    assert (len(train), len(val), len(test)) == (16, 4, 2)
    assert not {item.key for item in draw_shots(train, 8, seed=0)} & {item.key for item in val}


def test_a_val_split_that_is_there_is_kept():
    own = [Labelled("v0", Path("v0"), 0)]
    of = given(val=own)
    assert of.split("val") == own
    assert len(of.split("train")) == 8


def test_facts_tell_data_apart_wherever_it_is(tmp_path):
    facts = given().facts()
    assert facts["pictures"] == {"train": 6, "val": 2, "test": 2}
    assert facts["classes"] == 2
    assert given(root=str(tmp_path)).facts()["digest"] == facts["digest"]
    assert given(train=items(4, 5)).facts()["digest"] != facts["digest"]
    assert given(classes=("cat", "cow")).facts()["digest"] != facts["digest"]
    assert given(seed=1).facts()["digest"] != facts["digest"]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"train": items(4, 0)}, "1 of 2 classes have no picture in train, first 'dog'"),
        ({"train": items(4, 4, 1)}, "2/00 of train has label 2, but there are 2 classes: labels go from 0 to 1"),
        ({"train": []}, "no picture in its train split"),
        ({"test": []}, "no picture in its test split"),
        ({"train": items(1, 1)}, "no val split, and no class of train has two pictures"),
        ({"test": items(1)}, "0/00 is twice in train and test"),
        ({"val": items(0, 1)}, "1/00 is twice in train and val"),
        ({"root": "/nowhere", "fetch": "Fetch it."}, "There is no folder /nowhere. Fetch it."),
    ],
)
def test_contents_that_no_method_can_learn_from(wrong, said):
    with pytest.raises(ValueError, match=said):
        given(**wrong).split("train")


def test_an_unknown_split_is_told_the_others():
    with pytest.raises(ValueError, match="There is no split 'valid': choose train, val, test"):
        given().split("valid")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"templates": []}, "data.set.templates must be a list of one or more"),
        ({"templates": "a {}"}, "data.set.templates must be a list of one or more"),
        ({"templates": ["a {}", "a photo"]}, "'a photo': it must have one {}, for the class"),
        ({"templates": ["a {} of {}"]}, "'a {} of {}': it must have one {}"),
        ({"templates": ["a {c}"]}, "'a {c}': it must have one {}"),
        ({"val_share": 1.0}, "data.set.val_share is 1.0: set a share between 0 and 1"),
    ],
)
def test_settings_are_checked_at_once(wrong, said):
    with pytest.raises(ValueError, match=said):
        given(**wrong)


def test_the_root_may_be_the_folder_above_or_the_set_itself(tmp_path):
    (tmp_path / "flowers102").mkdir()
    names = ["oxford_flowers", "flowers102"]
    assert given(root=str(tmp_path), folder=names).home == tmp_path / "flowers102"
    assert given(root=str(tmp_path / "flowers102"), folder=names).home == tmp_path / "flowers102"
    assert given(root=str(tmp_path / "else"), folder=names).home == tmp_path / "else" / "oxford_flowers"


# -- sentences ---------------------------------------------------------------------------------------------------------


def prompts(tmp_path, content: object) -> str:
    file = tmp_path / "CuPL_prompts_pets.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(file)


def test_sentences_are_those_of_the_classes_in_their_order(tmp_path):
    file = prompts(tmp_path, {"sea_lion": ["It swims."], "cat": ["It purrs.", "It has whiskers."], "cow": ["Moo."]})
    of = given(classes=("cat", "sea lion"), prompts=file)
    assert of.prompts == {"cat": ["It purrs.", "It has whiskers."], "sea lion": ["It swims."]}
    assert list(of.prompts) == of.classes
    assert of.facts()["files"] == [file]
    assert given().prompts == {}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            {"cat": ["It purrs."], "dogs": ["It barks."]},
            "no sentences for 'dog' .1 of 2 classes are missing; it has 'dogs'",
        ),
        ({"cat": ["It purrs."]}, "no sentences for 'dog'"),
        ({"cat": ["It purrs."], "dog": []}, "'dog' must have a list of one or more sentences"),
        ({"cat": ["It purrs."], "dog": "It barks."}, "'dog' must have a list of one or more sentences"),
        (["It purrs."], "must be an object"),
        ('{"cat": ["It pu', "cannot be read as json"),
    ],
)
def test_a_wrong_file_of_sentences_is_refused(tmp_path, content, said):
    with pytest.raises(ValueError, match=said):
        given(prompts=prompts(tmp_path, content)).prompts  # noqa: B018


def test_a_missing_file_of_sentences_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"data.set.prompts=\S+none.json: there is no such file"):
        given(prompts=str(tmp_path / "none.json")).prompts  # noqa: B018


# -- pictures ----------------------------------------------------------------------------------------------------------


def test_a_picture_is_decoded_to_rgb(tmp_path):
    grey = Image.new("L", (5, 4), 200)
    grey.save(tmp_path / "a.png")
    for image in (tmp_path / "a.png", (tmp_path / "a.png").read_bytes(), grey):
        picture = Labelled("a", image, 0).picture()
        assert (picture.mode, picture.size, picture.getpixel((0, 0))) == ("RGB", (5, 4), (200, 200, 200))


@pytest.mark.parametrize("content", [b"", b"<html>", None])
def test_a_picture_that_cannot_be_read_is_named(tmp_path, content):
    file = tmp_path / "a.jpg"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=r"a.jpg cannot be read as a picture .*: fetch it again"):
        Labelled("a", file, 0).picture()


def test_a_picture_that_is_cut_off_is_named(tmp_path):
    file = tmp_path / "a.png"
    Image.effect_noise((64, 64), 50).save(file)
    file.write_bytes(file.read_bytes()[:1500])
    for image in (file, file.read_bytes(), Image.open(file)):
        with pytest.raises(ValueError, match="cannot be read as a picture"):
            Labelled("a.png", image, 0).picture()


# -- features of the authors -------------------------------------------------------------------------------------------

SHOTS, CLASSES, WIDTH = 2, 3, 5


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """Write what the authors' code writes, from a GPU in half precision, and return it."""
    torch.manual_seed(0)
    labels = torch.arange(CLASSES).repeat_interleave(SHOTS)
    tensors = {
        "keys_2shots": torch.randn(WIDTH, SHOTS * CLASSES).half(),
        "values_2shots": torch.nn.functional.one_hot(labels).half(),
        "val_f": torch.randn(4, WIDTH).half(),
        "val_l": torch.tensor([0, 1, 2, 2]),
        "test_f": torch.randn(7, WIDTH).half(),
        "test_l": torch.tensor([0, 1, 2, 2, 1, 0, 0]),
        "text_weights_cupl_t": torch.randn(WIDTH, CLASSES).half(),
    }
    for name, tensor in tensors.items():
        torch.save(tensor, folder / f"{name}.pt")
        as_of_a_gpu(folder / f"{name}.pt")
    return tensors


def as_of_a_gpu(file: Path) -> None:
    """Change the device that a stored tensor says it was on; strings of a pickle begin with their length."""
    cpu, cuda = b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0"
    with zipfile.ZipFile(file) as old:
        members = {name: old.read(name) for name in old.namelist()}
    (pickled,) = (name for name in members if name.endswith("data.pkl"))
    assert members[pickled].count(cpu) == 1
    members[pickled] = members[pickled].replace(cpu, cuda)
    with zipfile.ZipFile(file, "w") as new:
        for name, content in members.items():
            new.writestr(name, content)


def test_features_of_the_authors_become_rows_of_items(tmp_path):
    tensors = stored(tmp_path)
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="CUDA"):
            torch.load(tmp_path / "keys_2shots.pt", weights_only=True)  # the files are really those of a GPU
    found = read_cache(str(tmp_path), 2)
    torch.testing.assert_close(found.keys, tensors["keys_2shots"].float().T, rtol=0, atol=0)
    torch.testing.assert_close(found.text, tensors["text_weights_cupl_t"].float().T, rtol=0, atol=0)
    torch.testing.assert_close(found.test, tensors["test_f"].float(), rtol=0, atol=0)
    assert found.values.argmax(dim=1).tolist() == [0, 0, 1, 1, 2, 2]
    assert (found.val_labels.tolist(), found.test_labels.tolist()) == ([0, 1, 2, 2], [0, 1, 2, 2, 1, 0, 0])
    assert {tensor.dtype for tensor in found} == {torch.float32, torch.int64}


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("val_l", torch.tensor([0, 1, 2, 3]), "val_l.pt has labels outside of 0 to 2"),
        ("val_l", torch.tensor([0, 1]), r"val_f.pt is \[4, 5\], but \[2, 5\] fits"),
        ("text_weights_cupl_t", torch.zeros(6, 3), r"text_weights_cupl_t.pt is \[6, 3\], but \[5, 3\] fits"),
        ("values_2shots", torch.zeros(6, 4), r"values_2shots.pt is \[6, 4\], but \[6, 3\] fits"),
        ("keys_2shots", torch.zeros(5), "keys_2shots.pt is of shape .5., but must be a tensor with 2 dimensions"),
        ("keys_2shots", torch.full((5, 6), torch.nan), "keys_2shots.pt has values that are not finite"),
        ("test_f", {"a": 1}, "test_f.pt is a dict, but must be a tensor with 2 dimensions"),
        ("test_f", Path("code"), "test_f.pt cannot be read as a tensor"),
        ("test_f", None, "There is no .*test_f.pt: .*, but not for ImageNet, whose val_f.pt is the test split"),
    ],
)
def test_features_that_do_not_fit_are_refused(tmp_path, name, content, said):
    stored(tmp_path)
    file = tmp_path / f"{name}.pt"
    if content is None:
        file.unlink()
    else:
        torch.save(content, file)
    with pytest.raises(ValueError, match=said) as caught:
        read_cache(str(tmp_path), 2)
    assert "\n" not in str(caught.value)


class Code:
    """Something whose pickle runs code when it is loaded: it makes a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return open, (str(self.file), "w")


def test_code_in_stored_features_does_not_run(tmp_path):
    stored(tmp_path)
    torch.save(Code(tmp_path / "ran"), tmp_path / "val_f.pt")
    with pytest.raises(ValueError, match=r"val_f.pt cannot be read as a tensor"):
        read_cache(str(tmp_path), 2)
    assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / "val_f.pt", weights_only=False).close()
    assert (tmp_path / "ran").exists()


def test_features_of_other_shots_are_refused(tmp_path):
    stored(tmp_path)
    for name in ("keys", "values"):
        shutil.copy(tmp_path / f"{name}_2shots.pt", tmp_path / f"{name}_4shots.pt")
    with pytest.raises(ValueError, match="6 pictures, but 4 shots of 3 classes are 12"):
        read_cache(str(tmp_path), 4)


def test_damaged_features_are_named(tmp_path):
    stored(tmp_path)
    (tmp_path / "val_f.pt").write_bytes(b"PK\x03\x04 cut off")
    with pytest.raises(ValueError, match=r"val_f.pt cannot be read as a tensor"):
        read_cache(str(tmp_path), 2)
