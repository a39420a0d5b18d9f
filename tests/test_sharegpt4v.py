"""ShareGPT4V's json and pictures to shards: what is counted, what is held out, what a stopped run leaves."""

import json
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
from shards import encoded, picture

import clipfix.data.decoding
from clipfix.__main__ import main
from clipfix.data import sharegpt4v
from clipfix.data.decoding import samples
from clipfix.data.module import ShardData
from clipfix.data.needs import Needs
from clipfix.data.sharegpt4v import prepare

NUMBERS = {"held_out": 4, "records_per_shard": 3, "threads": 2}
FOLDERS = {
    "sam": "sam/images/sa_{}.jpg",
    "coco": "coco/train2017/{:012d}.jpg",
    "llava": "llava/llava_pretrain/images/{}.png",
}


def caption(number: int) -> str:
    return f"Picture {number} is plain. It has one colour. Nothing moves."


@pytest.fixture
def corpus(tmp_path: Path) -> dict[str, Path]:
    """20 records, sources in blocks as in the original; of SAM's seven pictures two are there."""
    sources = ["sam"] * 7 + ["coco"] * 6 + ["llava"] * 7
    records = []
    for number, source in enumerate(sources):
        image = FOLDERS[source].format(number)
        turns = [{"from": "human", "value": "What is it?\n<image>"}, {"from": "gpt", "value": caption(number)}]
        records.append({"id": str(number), "image": image, "conversations": turns})
        path = tmp_path / "images" / image
        path.parent.mkdir(parents=True, exist_ok=True)
        if source != "sam" or number in (1, 5):
            path.write_bytes(encoded(picture(number), path.suffix[1:]))
    records[8]["conversations"][1]["value"] = " \n"
    records[9]["conversations"][1]["value"] = "The first.\nThe second."  # Long-CLIP makes blanks of line ends
    records[10]["image"] = "coco/train2017/10.gif"
    (tmp_path / "images/coco/train2017/10.gif").write_bytes(b"GIF89a")
    records[14]["image"] = "llava/llava_pretrain/images/14.JPG"
    (tmp_path / "images/llava/llava_pretrain/images/14.JPG").write_bytes(b"<html>404</html>")  # training skips it
    (tmp_path / "images/llava/llava_pretrain/images/19.png").unlink()
    (tmp_path / "records.json").write_text(json.dumps(records))
    return {"records": tmp_path / "records.json", "images": tmp_path / "images", "root": tmp_path / "out" / "shards"}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_every_record_is_written_or_counted(corpus: dict[str, Path], capsys: pytest.CaptureFixture) -> None:
    folder = prepare(**corpus, **NUMBERS)
    lines = [line.replace("│", " ").split() for line in capsys.readouterr().out.splitlines()]
    assert ["coco", "6", "4", "0", "(0.0", "%)", "1", "1"] in lines
    assert ["llava", "7", "6", "1", "(14.3", "%)", "0", "0"] in lines
    assert ["sam", "7", "2", "5", "(71.4", "%)", "0", "0"] in lines
    assert ["all", "20", "12", "6", "(30.0", "%)", "1", "1"] in lines
    size = sum(tar.stat().st_size for tar in folder.glob("*.tar"))
    assert any({"11", "1", str(folder) + ",", str(size)} <= set(line) for line in lines)


def test_samples_read_back_and_the_first_records_are_held_out(corpus: dict[str, Path], tmp_path: Path) -> None:
    folder = prepare(**corpus, **NUMBERS)
    held_out = list(samples(str(folder / "selection-*.tar")))
    assert [sample["key"] for sample in held_out] == ["0000001"]
    train = {int(sample["key"]): sample for sample in samples(str(folder / "train-*.tar"))}
    assert set(train) == {5, 7, 9, 11, 12, 13, 15, 16, 17, 18}  # 14 is there and no picture
    assert list(train) != sorted(train)  # mixed
    for number, sample in train.items():
        assert sample["json"]["source"] == "sam" if number == 5 else "coco" if number < 13 else "llava"
        assert sample["json"]["long"] == (caption(number) if number != 9 else "The first. The second.")
        assert abs(sample["image"].getpixel((0, 0))[0] - number) < 4  # jpg is lossy
    assert b"0000014.jpg" in b"".join(path.read_bytes() for path in folder.glob("*.tar"))


def test_a_range_without_pictures_leaves_no_shard_but_its_counts(corpus: dict[str, Path]) -> None:
    folder = prepare(**corpus, **NUMBERS | {"held_out": 1, "records_per_shard": 1})
    assert not list(folder.glob("selection-*.tar"))
    assert (folder / "selection-00000.json").exists()
    assert len(list(folder.glob("train-*.tar"))) == 12
    assert len(list(folder.glob("train-*.json"))) == 19


def test_without_a_held_out_picture_it_says_how_to_train(corpus: dict[str, Path], capsys: Any) -> None:
    prepare(**corpus, **NUMBERS | {"held_out": 1})
    assert "data.selection=null" in capsys.readouterr().out


@pytest.mark.parametrize("stop", [0, 3, 7, 11])
@pytest.mark.parametrize("threads", [1, 3])
def test_a_stopped_run_goes_on_to_the_same_bytes(
    stop: int, threads: int, corpus: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = contents(prepare(**corpus | {"root": tmp_path / "whole"}, **NUMBERS))
    folder, numbers = corpus["root"], NUMBERS | {"threads": threads}
    add, added = tarfile.TarFile.addfile, 0

    def full(tar: Any, member: Any, content: Any) -> None:
        nonlocal added
        added += 1
        if added > 2 * stop + 1:  # between picture and text
            raise OSError("disk full")
        add(tar, member, content)

    with monkeypatch.context() as patch:
        patch.setattr("tarfile.TarFile.addfile", full)
        with pytest.raises(OSError, match="disk full"):
            prepare(**corpus, **numbers)
    # By its counts, which are written last: other threads may just have come from one to the other.
    done = [path.with_suffix(".tar") for path in folder.glob("*-*.json")]
    finished = {path.name: path.stat().st_mtime_ns for path in done if path.exists()}
    assert all(whole[name] == (folder / name).read_bytes() for name in finished)
    assert len(finished) < 6
    (folder / ".train-00001.killed.part").write_bytes(b"half a shard")  # what a killed process cannot tidy up
    assert contents(prepare(**corpus, **numbers)) == whole
    assert {name: (folder / name).stat().st_mtime_ns for name in finished} == finished


def test_a_process_killed_while_writing_leaves_whole_shards(corpus: dict[str, Path], tmp_path: Path) -> None:
    whole = contents(prepare(**corpus | {"root": tmp_path / "whole"}, **NUMBERS))
    script = (
        "import os, sys, tarfile\n"
        "from clipfix.data.sharegpt4v import prepare\n"
        "add, added = tarfile.TarFile.addfile, []\n"
        "def die(tar, *arguments):\n"
        "    added.append(tar)\n"
        "    if len(added) > 12: os.kill(os.getpid(), 9)\n"
        "    add(tar, *arguments)\n"
        "tarfile.TarFile.addfile = die\n"
        f"prepare(*sys.argv[1:], **{NUMBERS})\n"
    )
    died = subprocess.run([sys.executable, "-c", script, *map(str, corpus.values())], capture_output=True, check=False)
    assert died.returncode == -9, died.stderr
    left = contents(corpus["root"])
    assert any(name.endswith(".part") for name in left)
    assert all(whole[name] == content for name, content in left.items() if not name.endswith(".part"))
    assert contents(prepare(**corpus, **NUMBERS)) == whole


def test_a_second_run_writes_nothing_and_counts_the_same(corpus: dict[str, Path], capsys: Any) -> None:
    folder = prepare(**corpus, **NUMBERS)
    first = capsys.readouterr().out
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    prepare(**corpus, **NUMBERS)
    assert capsys.readouterr().out.splitlines()[-4:] == first.splitlines()[-4:]
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_a_folder_begun_otherwise_is_refused(corpus: dict[str, Path]) -> None:
    folder = prepare(**corpus, **NUMBERS)
    for changed in ({"held_out": 5}, {"records_per_shard": 4}):
        with pytest.raises(ValueError, match="delete it or set another"):
            prepare(**corpus, **NUMBERS | changed)
    (folder / "info.json").unlink()
    with pytest.raises(ValueError, match=r"without info\.json"):
        prepare(**corpus, **NUMBERS)


def test_without_records_it_uses_the_shards_that_are_there(corpus: dict[str, Path], caplog: Any) -> None:
    later = {"records": None, "images": None, "root": corpus["root"]}
    with pytest.raises(
        ValueError, match=r"no ShareGPT4V shards .* run=prepare data=sharegpt4v data\.prepare\.records="
    ):
        prepare(**later, **NUMBERS)
    before = contents(prepare(**corpus, **NUMBERS))
    assert contents(prepare(**later, **NUMBERS)) == before
    assert not caplog.messages
    (corpus["root"] / "train-00002.json").unlink()
    prepare(**later, **NUMBERS)
    assert "has 7 of 8 shards" in caplog.text


def broken(corpus: dict[str, Path], change: Any) -> None:
    records = json.loads(corpus["records"].read_text())
    change(records)
    corpus["records"].write_text(json.dumps(records))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["records"].unlink(), "there is no .*records.json"),
        (lambda c: c.update(images=None), "None is no folder: set data.prepare.images"),
        (lambda c: c.update(images=c["images"] / "nowhere"), "nowhere is no folder"),
        (lambda c: c.update(images=c["images"] / "coco"), "has no folder coco, llava, sam"),
        (lambda c: c["records"].write_text(c["records"].read_text()[:-99]), "records.json is not json: .*line 1"),
        (lambda c: c["records"].write_text("{}"), "is not a list of records"),
        (lambda c: c["records"].write_text("[]"), "is not a list of records"),
        (lambda c: broken(c, lambda r: r[3].pop("image")), "record 3 of .* is not .*'id': '3'"),
        (lambda c: broken(c, lambda r: r[4].update(image=7)), "record 4 of"),
        (lambda c: broken(c, lambda r: r[5]["conversations"].pop()), "record 5 of"),
        (lambda c: broken(c, lambda r: r[6]["conversations"][1].update(value=["a"])), "record 6 of"),
        (lambda c: broken(c, lambda r: r.insert(2, "a caption")), "record 2 of .* a caption"),
        (lambda c: broken(c, lambda r: r.__delitem__(slice(4, None))), "leaves none of 4 records"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(change: Any, message: str, corpus: dict[str, Any]) -> None:
    change(corpus)
    with pytest.raises(ValueError, match=message):
        prepare(**corpus, **NUMBERS)
    assert not corpus["root"].exists()


def test_pictures_in_the_wrong_place_are_told(corpus: dict[str, Path]) -> None:
    for source in ("coco/train2017", "sam/images", "llava/llava_pretrain"):
        (corpus["images"] / source).rename(corpus["images"] / source.replace("/", "/moved-"))
    with pytest.raises(ValueError, match=r"no training record has its picture: .*data\.prepare\.images"):
        prepare(**corpus, **NUMBERS)


def test_training_reads_the_shards_and_counts_what_is_no_picture(corpus: dict[str, Path]) -> None:
    folder = prepare(**corpus, **NUMBERS)
    texts = {"caption": {"key": "long", "pick": "first_sentence"}, "long": {"key": "long", "pick": "one"}}
    sizes = {"batch_size": 10, "workers": 0, "shuffle": 0, "seed": 0, "needs": Needs(16)}
    data = ShardData(f"{folder}/train-*.tar", None, texts, **sizes)
    data.prepare_data()
    data.setup("fit")
    first, second = (batch for batch, _ in zip(data.train_dataloader(), range(2), strict=False))
    assert sorted(first["caption"])[0] == "Picture 11 is plain"
    assert first["skipped"] + second["skipped"] >= 2  # once in each pass, and when it is drawn to replace itself


def test_it_reads_the_pictures_that_clipfix_data_reads() -> None:
    assert sharegpt4v.IMAGES == clipfix.data.decoding.IMAGES


def test_packing_does_not_load_torch() -> None:
    code = "import clipfix.data.sharegpt4v, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---------------------------------------------------------------------------------------------------------- front door


def clipfix_prepare(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["clipfix", "run=prepare", *arguments])
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    main()


def test_the_command(corpus: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = [f"data.prepare.{key}={corpus[key]}" for key in ("records", "images")]
    clipfix_prepare(monkeypatch, "data=sharegpt4v", "data.prepare.held_out=4", *arguments)
    printed = capsys.readouterr().out
    assert "5 (71.4 %)" in printed
    assert "Shards are in data/sharegpt4v" in printed
    assert len(list(samples("data/sharegpt4v/train-00000.tar"))) == 10
    clipfix_prepare(monkeypatch, "data=sharegpt4v_debias")  # made already
    assert "Shards are in data/sharegpt4v" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["data=shards"], "data=shards has no data.prepare"),
        (["data=sharegpt4v"], "no ShareGPT4V shards in data/sharegpt4v: .*data.prepare.records="),
        (["data=sharegpt4v", "data.prepare.records=nowhere.json"], "there is no nowhere.json"),
    ],
)
def test_the_command_says_what_is_missing(
    arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=words) as exit_:
        clipfix_prepare(monkeypatch, *arguments)
    assert len(str(exit_.value.code).splitlines()) == 2  # the error, and how to see where it came from
