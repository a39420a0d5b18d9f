"""Readers of labelled sets, each on its own layout in miniature, and the drawn set."""

import io
import json
import os
import tarfile
from pathlib import Path

import open_clip
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image
from torch.nn.functional import normalize

import clipfix.cli.resolvers  # noqa: F401  what yaml may ask for
from clipfix import PACKAGE
from clipfix.data.decoding import square
from clipfix.data.labelled import LabelledSet, draw_shots
from clipfix.data.scenes.shards import split_of
from clipfix.data.sets.by_folder import Folders
from clipfix.data.sets.drawn import CLASSES, OWN, Drawn, class_names, one_thing
from clipfix.models.clip import Backbone
from clipfix.system.files import add_sample

CONF = Path(__file__).parents[1] / "conf" / "labelled"
# Of each set: the folder, the one that pictures are in, the json, and another name of the folder. Written out here, and
# not read from the yaml files that they test. Source: CoOp, DATASETS.md.
COOP = {
    "caltech101": ("caltech-101", "101_ObjectCategories", "Caltech101", None),
    "dtd": ("dtd", "images", "DescribableTextures", None),
    "eurosat": ("eurosat", "2750", "EuroSAT", None),
    "food101": ("food-101", "images", "Food101", None),
    "flowers": ("oxford_flowers", "jpg", "OxfordFlowers", "flowers102"),
    "pets": ("oxford_pets", "images", "OxfordPets", "oxfordpets"),
    "cars": ("stanford_cars", ".", "StanfordCars", "stanfordcars"),
    "sun397": ("sun397", "SUN397", "SUN397", None),
    "ucf101": ("ucf101", "UCF-101-midframes", "UCF101", None),
}
ROWS = {
    "train": [["sea_lion/a b.jpg", 0, "sea_lion"], ["cat/1.jpg", 1, "cat"], ["cat/2.jpg", 1, "cat"]],
    "val": [["cat/3.jpg", 1, "cat"]],
    "test": [["sea_lion/[2].jpg", 0, "sea_lion"], ["cat/4.jpg", 1, "cat"]],
}


def picture(file: Path, value: int = 0) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), (value, 0, 0)).save(file)


def labelled(name: str, root: Path, **settings: object) -> LabelledSet:
    """The set of a yaml file in `root`."""
    return instantiate(OmegaConf.merge(OmegaConf.load(CONF / f"{name}.yaml"), {"root": str(root), **settings}))


def rows(of: LabelledSet) -> dict[str, list[tuple[str, int]]]:
    return {name: [(item.key, item.label) for item in of.split(name)] for name in ("train", "val", "test")}


def coop(root: Path, name: str, content: dict | None = None, folder: str | None = None) -> Path:
    """Write a set with CoOp's json, with the pictures that it lists, and return the json."""
    first, pictures, title, _ = COOP[name]
    home = root / (folder or first)
    for split in (content or ROWS).values():
        for path, *_ in split:
            picture(home / pictures / path)
    file = home / f"split_zhou_{title}.json"
    file.write_text(json.dumps(content or ROWS))
    return file


# -- CoOp's json -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COOP)
def test_each_set_of_coop_is_read_from_its_folder(tmp_path, name):
    coop(tmp_path, name)
    of = labelled(name, tmp_path)
    assert of.classes == ["sea lion", "cat"]
    assert rows(of) == {split: [(path, label) for path, label, _ in ROWS[split]] for split in ROWS}
    assert of.split("train")[0].picture().size == (4, 4)


@pytest.mark.parametrize("name", [name for name, (*_, other) in COOP.items() if other])
def test_a_folder_may_have_its_other_name(tmp_path, name):
    coop(tmp_path, name, folder=COOP[name][-1])
    assert labelled(name, tmp_path).classes == ["sea lion", "cat"]


def test_a_json_without_val_has_val_carved_out(tmp_path):
    train = [[f"cat/{n}.jpg", 0, "cat"] for n in range(10)]
    coop(tmp_path, "dtd", {"train": train, "val": [], "test": [["cat/t.jpg", 0, "cat"]]})
    of = labelled("dtd", tmp_path)
    assert (len(of.split("train")), len(of.split("val"))) == (8, 2)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c["train"].append(["cat/9.jpg", 3, "dog"]), "labels go up to 3, but no picture has label 2"),
        (lambda c: c["train"].append(["cat/9.jpg", 1, "dog"]), "label 1 is 'cat' and 'dog': it must be one"),
        (lambda c: c["test"].append(["cat/9.jpg", 2, "cat"]), "two classes 'cat'"),
        (lambda c: c["train"].append(["cat/9.jpg", -1, "dog"]), "must be .path, label from 0, class name."),
        (lambda c: c["train"].append(["cat/9.jpg", "1", "dog"]), "must be .path, label from 0, class name."),
        (lambda c: c.pop("test"), "has no list 'test': it must be one of CoOp's"),
        (lambda c: c["test"].append(["cat/1.jpg", 1, "cat"]), "cat/1.jpg is twice in train and test"),
        (lambda c: c["test"].append(["cat/9.jpg", 2, "dog"]), "1 of 3 classes have no picture in train, first 'dog'"),
    ],
)
def test_a_json_that_is_wrong_is_refused(tmp_path, change, said):
    content = json.loads(json.dumps(ROWS))
    change(content)
    coop(tmp_path, "dtd", content)
    with pytest.raises(ValueError, match=said):
        labelled("dtd", tmp_path).split("train")


def test_a_json_that_lists_missing_pictures_says_how_many(tmp_path):
    file = coop(tmp_path, "dtd")
    for name in ("cat/2.jpg", "cat/4.jpg"):
        (tmp_path / "dtd" / "images" / name).unlink()
    with pytest.raises(
        ValueError, match=f"{file} lists 2 of 6 pictures that do not exist, first .*cat/2.jpg: fetch them"
    ):
        labelled("dtd", tmp_path).split("train")


@pytest.mark.parametrize("content", ['{"train": [', "[]", '"train"'])
def test_a_json_that_is_damaged_is_named(tmp_path, content):
    coop(tmp_path, "dtd").write_text(content)
    with pytest.raises(ValueError, match=r"split_zhou_DescribableTextures.json"):
        labelled("dtd", tmp_path).split("train")


# -- what is missing ---------------------------------------------------------------------------------------------------

DOWNLOADED = [path.stem for path in CONF.glob("*.yaml") if "fetch" in OmegaConf.load(path)]


def test_the_eleven_sets_say_what_to_fetch():
    assert set(DOWNLOADED) == {*COOP, "fgvc", "imagenet"}


@pytest.mark.parametrize("name", DOWNLOADED)
def test_a_set_that_is_missing_says_what_to_fetch(tmp_path, name):
    of = labelled(name, tmp_path)
    with pytest.raises(ValueError, match=r"There is no folder \S+\. Fetch .*must hold .*DATASETS.md") as caught:
        of.split("test")
    assert str(of.home) in str(caught.value)
    of.home.mkdir()
    with pytest.raises(ValueError, match=r"Fetch|has no folder"):
        of.split("test")


# -- FGVC --------------------------------------------------------------------------------------------------------------

VARIANTS = ["707-320", "A300B4", "Boeing 717"]


def aircraft(root: Path, folder: str = "fgvc_aircraft") -> Path:
    home = root / folder
    lists = {"train": ["01 A300B4", "02 Boeing 717", "03 707-320"], "val": ["04 Boeing 717"], "test": ["05 A300B4"]}
    for split, lines in lists.items():
        for line in lines:
            picture(home / "images" / f"{line.split()[0]}.jpg")
        (home / f"images_variant_{split}.txt").write_text("\n".join(lines) + "\n")
    (home / "variants.txt").write_text("\n".join(VARIANTS) + "\n")
    return home


@pytest.mark.parametrize("folder", ["fgvc_aircraft", "fgvcaircraft"])
def test_fgvc_has_the_order_of_its_variants_and_names_with_blanks(tmp_path, folder):
    aircraft(tmp_path, folder)
    of = labelled("fgvc", tmp_path)
    assert of.classes == VARIANTS
    assert rows(of) == {"train": [("01", 1), ("02", 2), ("03", 0)], "val": [("04", 2)], "test": [("05", 1)]}
    assert of.split("val")[0].image.name == "04.jpg"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda home: (home / "images" / "02.jpg").unlink(), "lists 1 of 3 pictures that do not exist, first .*02.jpg"),
        (
            lambda home: (home / "variants.txt").write_text("707-320\nA300B4\n"),
            "'02 Boeing 717' must be an id and a name",
        ),
        (lambda home: (home / "images_variant_val.txt").unlink(), "There is no .*images_variant_val.txt. Fetch"),
        (lambda home: (home / "images_variant_test.txt").write_text("01 A300B4\n"), "01 is twice in train and test"),
    ],
)
def test_lists_of_fgvc_that_are_wrong_are_refused(tmp_path, change, said):
    change(aircraft(tmp_path))
    with pytest.raises(ValueError, match=said):
        labelled("fgvc", tmp_path).split("train")


# -- folders -----------------------------------------------------------------------------------------------------------


def folders(root: Path, splits: tuple[str, ...] = ("train", "val", "test"), number: int = 2) -> None:
    for split in splits:
        for label, name in enumerate(("cat", "sea_lion")):
            for n in range(number):
                picture(root / split / name / f"{n}.{'JPEG' if n else 'png'}", 10 * label + n)


def test_a_folder_per_class_in_each_split(tmp_path):
    folders(tmp_path)
    (tmp_path / "train" / "cat" / "notes.txt").write_text("no picture")
    of = labelled("folder", tmp_path)
    assert of.classes == ["cat", "sea lion"]
    for split in ("train", "val", "test"):
        expected = [("cat/0.png", 0), ("cat/1.JPEG", 0), ("sea_lion/0.png", 1), ("sea_lion/1.JPEG", 1)]
        assert rows(of)[split] == [(f"{split}/{key}", label) for key, label in expected]


@pytest.mark.parametrize("settings", [{}, {"val": None}])
def test_val_comes_out_of_train_if_there_is_none_or_it_is_not_to_be_read(tmp_path, settings):
    folders(tmp_path, ("train", "test") if not settings else ("train", "val", "test"), number=10)
    found = rows(labelled("folder", tmp_path, **settings))
    assert {name: len(items) for name, items in found.items()} == {"train": 16, "val": 4, "test": 20}
    assert all(key.startswith("train/") for key, _ in found["val"])


def test_folders_of_classes_alone_are_cut_into_splits_by_seed(tmp_path):
    folders(tmp_path, ("",), number=20)
    found = rows(labelled("folder", tmp_path))
    assert {name: len(items) for name, items in found.items()} == {"train": 22, "val": 6, "test": 12}
    assert len({key for items in found.values() for key, _ in items}) == 40
    assert rows(labelled("folder", tmp_path)) == found
    assert rows(labelled("folder", tmp_path, seed=1))["test"] != found["test"]


def test_folders_have_the_names_of_a_file(tmp_path):
    folders(tmp_path / "set")
    names = tmp_path / "names.txt"
    names.write_text("house cat\nsteller sea lion\n")
    assert labelled("folder", tmp_path / "set", names=str(names)).classes == ["house cat", "steller sea lion"]
    names.write_text("house cat\n")
    with pytest.raises(ValueError, match=r"data.set.names has 1 names, but .*train has 2 folders"):
        labelled("folder", tmp_path / "set", names=str(names)).classes  # noqa: B018


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda root: (root / "train" / "empty").mkdir(), "train/empty has no picture"),
        (lambda root: (root / "test" / "cat").rename(root / "test" / "dog"), "test/dog is no class of train"),
        (lambda root: (root / "test").rename(root / "tests"), "has train/, but no test/ for the test split"),
        (lambda root: (root / "train").rename(root / "training"), "has test/, but no train/ for the train split"),
        (lambda root: picture(root / "train" / "sea lion" / "1.jpg"), "two classes 'sea lion'"),
    ],
)
def test_folders_that_are_wrong_are_named(tmp_path, change, said):
    folders(tmp_path)
    change(tmp_path)
    with pytest.raises(ValueError, match=said):
        labelled("folder", tmp_path).split("train")


def test_a_folder_without_classes_is_named(tmp_path):
    picture(tmp_path / "1.jpg")
    with pytest.raises(ValueError, match="has no folder: put the pictures of each class into one of its own"):
        labelled("folder", tmp_path).split("train")


def test_imagenet_takes_shots_and_val_from_train_and_tests_on_val(tmp_path):
    home = tmp_path / "imagenet" / "images"
    for number in range(1000):  # links, which are quicker than a thousand pictures
        for split, pictures in ("train", 2), ("val", 1):
            folder = home / split / f"n{number:08d}"
            folder.mkdir(parents=True)
            for n in range(pictures):
                os.symlink("/dev/null", folder / f"{n}.JPEG")
    of = labelled("imagenet", tmp_path)
    assert of.classes == list(open_clip.IMAGENET_CLASSNAMES)
    assert of.templates == [template("{}") for template in open_clip.SIMPLE_IMAGENET_TEMPLATES]
    assert [len(of.split(name)) for name in ("train", "val", "test")] == [1000, 1000, 1000]
    assert all(item.key.startswith("images/train") for item in of.split("val"))
    assert all(item.key.startswith("images/val") for item in of.split("test"))


# -- shards ------------------------------------------------------------------------------------------------------------


def png(value: int = 0, mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    Image.new(mode, (4, 4), value).save(file, "png")
    return file.getvalue()


def shard(file: Path, *samples: dict[str, bytes]) -> None:
    with tarfile.open(file, "w") as tar:
        for number, sample in enumerate(samples):
            add_sample(tar, f"{number:03d}", {"png": png(number)} | sample)


def shards(root: Path, sample) -> LabelledSet:
    """Two classes, two pictures of each, in train and test; `sample` makes the files of one from label and name."""
    for split in ("train", "test"):
        shard(root / f"{split}-0.tar", *(sample(label, name) for label, name in [(1, "dog"), (0, "cat")] * 2))
    return labelled("shards", root, train="train-*.tar", test="test-0.tar")


@pytest.mark.parametrize(
    "sample",
    [
        lambda label, name: {"cls": b"%d" % label, "cls.txt": name.encode() + b"\n"},
        lambda label, name: {"cls": b"%d\n" % label, "json": json.dumps({"class_name": name}).encode()},
        lambda label, name: {"json": json.dumps({"label": label, "class_name": name}).encode()},
    ],
)
def test_shards_have_labels_and_names_in_three_forms(tmp_path, sample):
    of = shards(tmp_path, sample)
    assert of.classes == ["cat", "dog"]
    assert rows(of)["test"] == [
        ("test-00000/000", 1),
        ("test-00000/001", 0),
        ("test-00000/002", 1),
        ("test-00000/003", 0),
    ]
    assert [len(of.split(name)) for name in ("train", "val")] == [2, 2]
    assert of.split("test")[2].picture().getpixel((0, 0)) == (2, 0, 0)


def test_pictures_of_shards_are_not_decoded_when_listed(tmp_path):
    file = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(file, "png")
    for name in ("a", "b"):
        shard(tmp_path / f"{name}.tar", *({"cls": b"0", "png": file.getvalue()[:1500]} for _ in range(2)))
    of = labelled("shards", tmp_path, train="a.tar", test="b.tar", names=["cat"])
    with pytest.raises(ValueError, match="test-00000/000 cannot be read as a picture"):
        of.split("test")[0].picture()


def test_shards_of_two_splits_may_have_one_name_but_not_be_the_same(tmp_path):
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        shard(tmp_path / split / "00000.tar", *({"cls": b"0"} for _ in range(2)))
    of = labelled("shards", tmp_path, train="train", test="test", names=["cat"])
    assert {name: len(items) for name, items in rows(of).items()} == {"train": 1, "val": 1, "test": 2}
    with pytest.raises(ValueError, match=r"00000.tar is read twice: name other shards in data.set.test"):
        labelled("shards", tmp_path, train="train", test="train/00000.tar", names=["cat"]).split("train")


def test_sixteen_bits_do_not_turn_white(tmp_path):
    shard(tmp_path / "a.tar", *({"cls": b"0", "png": png(256, "I;16")} for _ in range(2)))
    shard(tmp_path / "b.tar", {"cls": b"0"})
    of = labelled("shards", tmp_path, train="a.tar", test="b.tar", names=["cat"])
    assert of.split("train")[0].picture().getpixel((0, 0)) == (1, 1, 1)


@pytest.mark.parametrize(("suffix", "content"), [("txt", "cat\n\ndog\n"), ("json", '["cat", "dog"]')])
def test_shards_have_the_names_of_a_file(tmp_path, suffix, content):
    (tmp_path / f"names.{suffix}").write_text(content)
    shards(tmp_path, lambda label, _: {"cls": b"%d" % label})
    settings = {"train": "train-*.tar", "test": "test-0.tar", "names": str(tmp_path / f"names.{suffix}")}
    assert labelled("shards", tmp_path, **settings).classes == ["cat", "dog"]


@pytest.mark.parametrize(
    ("sample", "said"),
    [
        (lambda label, name: {}, "000 in .*train-0.tar has no label: it needs <key>.cls"),
        (lambda label, name: {"cls": name.encode()}, "has no label"),
        (lambda label, name: {"json": b'{"label": true}'}, "has no label"),
        (lambda label, name: {"json": b"[1]"}, "has no label"),
        (lambda label, name: {"json": b"{"}, "has no label"),
        (lambda label, name: {"cls": b"-1"}, "has no label"),
        (lambda label, name: {"cls": b"%d" % label}, "label 0 has no name: set data.set.names to a file"),
        (lambda label, name: {"cls": b"%d" % (2 * label), "cls.txt": name.encode()}, "no picture has label 1"),
        (lambda label, name: {"cls": b"0", "cls.txt": name.encode()}, "gives label 0 the name 'cat', not 'dog'"),
        (lambda label, name: {"cls": b"0", "png": b"<html>"}, "000 in .*train-0.tar cannot be read as a picture"),
    ],
)
def test_shards_whose_labels_are_wrong_are_refused(tmp_path, sample, said):
    with pytest.raises(ValueError, match=said):
        shards(tmp_path, sample).split("train")


def test_a_shard_that_is_cut_off_or_missing_is_refused(tmp_path):
    shards(tmp_path, lambda label, name: {"cls": b"%d" % label})
    settings = {"train": "train-0.tar", "test": "test-0.tar", "names": ["cat", "dog"]}
    with pytest.raises(ValueError, match=r"none.tar.*correct data.set.test"):
        labelled("shards", tmp_path, **settings | {"test": "none.tar"}).split("train")
    file = tmp_path / "train-0.tar"
    file.write_bytes(file.read_bytes()[:1700])
    with pytest.raises(ValueError, match=r"train-0.tar is broken .*: fetch it again"):
        labelled("shards", tmp_path, **settings).split("train")


# -- the drawn set -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> LabelledSet:
    return labelled("drawn", tmp_path_factory.mktemp("drawn") / "set")


def test_the_drawn_set_is_drawn_when_it_is_read(drawn):
    assert not drawn.home.exists() or any(drawn.home.iterdir())
    assert drawn.classes == class_names()
    assert len(drawn.classes) == sum(len(values) for _, values in CLASSES.values()) == 21
    assert drawn.facts()["pictures"] == {"train": 21 * 24, "val": 21 * 16, "test": 21 * 32}
    assert len(draw_shots(drawn.split("train"), 16, seed=0)) == 21 * 16
    pictures = [item.image.read_bytes() for split in ("train", "val", "test") for item in drawn.split(split)]
    assert len(set(pictures)) == len(pictures)  # of one class in all splits, and of different classes


def test_the_tiny_clip_knows_about_half_of_the_drawn_set(drawn):
    """A few examples then have something to add, and zero-shot is well above chance (5 %)."""
    backbone = Backbone(str(PACKAGE / "tiny" / "clip")).eval()
    test = drawn.split("test")
    with torch.no_grad():
        heads = [
            normalize(backbone.encode_text(backbone.tokenize([t.format(name) for t in drawn.templates])), dim=-1).mean(
                0
            )
            for name in drawn.classes
        ]
        images = torch.stack([square(item.picture(), backbone.image_size) for item in test])
        logits = normalize(backbone.encode_image(images), dim=-1) @ normalize(torch.stack(heads), dim=-1).T
    correct = logits.argmax(dim=1) == torch.tensor([item.label for item in test])
    assert 0.45 < correct.float().mean().item() < 0.55


def small(root: Path, **settings) -> Drawn:
    given = {"templates": ["{}"], "pictures": {"train": 2, "val": 1, "test": 1}} | settings
    return Drawn(root=str(root), **given)


def test_equal_settings_draw_equal_bytes_and_another_seed_other_ones(tmp_path):
    sets = [small(tmp_path / "a"), small(tmp_path / "b"), small(tmp_path / "c", seed=1)]
    first, again, other = ([item.image.read_bytes() for item in of.split("train")] for of in sets)
    assert first == again
    assert first != other


def test_a_set_of_other_settings_and_other_files_are_kept(tmp_path):
    small(tmp_path / "a").prepare()
    small(tmp_path / "a").prepare()  # nothing to do
    with pytest.raises(ValueError, match=r"data.set.root=.*a holds a set of other settings: delete the folder"):
        small(tmp_path / "a", seed=1).split("train")
    folders(tmp_path / "b")
    with pytest.raises(ValueError, match=r"data.set.root=.*b holds other files"):
        small(tmp_path / "b").split("train")


class Slow(Drawn):
    """One that another process overtakes."""

    def _draw(self, folder, split):
        super()._draw(folder, split)
        small(self.root).prepare()


def test_of_two_processes_the_first_to_finish_is_kept(tmp_path):
    slow = Slow(root=str(tmp_path / "a"), templates=["{}"], pictures={"train": 2, "val": 1, "test": 1})
    assert slow.prepare() == tmp_path / "a"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]  # no draft is left
    other = Slow(root=str(tmp_path / "b"), templates=["{}"], pictures={"train": 1, "val": 1, "test": 1})
    with pytest.raises(ValueError, match=r"b holds a set of other settings"):
        other.prepare()


def test_more_pictures_than_there_are_scenes_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"data.set.pictures.val is 5000, but there are only .* set .* or less"):
        small(tmp_path / "a", pictures={"train": 1, "val": 5000, "test": 1}).prepare()
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"data.set.pictures is .*: give train, val, test a number of 1 or more"):
        small(tmp_path / "a", pictures={"train": 1, "test": 1})


def test_a_scene_is_in_one_split_only():
    """The hash that decides it ignores where exactly a thing stands, and is that of the world's training scenes."""
    from random import Random

    scenes = [one_thing("star", {"fill": "solid"}, Random(number)) for number in range(50)]
    assert len({split_of(scene) for scene in scenes}) == len(set(OWN.values())) == 3


# -- recipes -----------------------------------------------------------------------------------------------------------

KEYS = {"alpha", "beta", "gamma", "search", "free", "trained", "keys"}


@pytest.mark.parametrize("name", sorted(path.stem for path in CONF.glob("*.yaml")))
def test_a_recipe_has_all_numbers_and_its_channels_are_whole_at_rn50s_width(name):
    recipe = OmegaConf.to_container(OmegaConf.load(CONF / f"{name}.yaml").recipe)
    assert set(recipe) == KEYS
    assert set(recipe["search"]) == {"alpha", "beta", "gamma", "steps"}
    assert set(recipe["trained"]) == {"channels", "weights", "lr", "eps", "weight_decay", "epochs"}
    assert set(recipe["keys"]) == {"lr", "eps", "weight_decay", "epochs"}
    for part in (recipe["free"], recipe["trained"]):
        assert 1024 * part["channels"] % 100 == 0
        assert sum(part["weights"]) == pytest.approx(1)


def test_a_set_of_ones_own_may_be_built_without_a_config(tmp_path):
    folders(tmp_path)
    of = Folders(root=str(tmp_path), templates=["a {}"])
    assert of.recipe == {}
    assert len(of.split("test")) == 4
