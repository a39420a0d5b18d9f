"""Shards in, the same shards with captions, features or latents: what is added, stays, and is left by a stopped run."""

import inspect
import io
import json
import logging
import multiprocessing
import os
import shutil
import signal
import sys
import tarfile
from functools import cache, partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import yaml
from captioners import KINDS, captioner
from diffusers import AutoencoderKL
from hydra.utils import get_class
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image
from ports import free_port
from shards import encoded, pack
from transformers import AutoModelForImageTextToText, AutoProcessor

from clipfix.__main__ import main
from clipfix.annotate import Annotator, annotate, plan, summarize
from clipfix.annotate.captions import Captions, with_key
from clipfix.annotate.features import Features
from clipfix.annotate.latents import Latents
from clipfix.data.decoding import decode, samples, square
from clipfix.data.module import ShardData
from clipfix.data.needs import Needs
from clipfix.data.shards import read_shard
from clipfix.evals.embed import embed_images, embed_texts
from clipfix.evals.features import scoring
from clipfix.models.clip import Backbone
from clipfix.models.diffusion import Diffusion

ROOT = Path(__file__).parents[1]
CHOICES = sorted(path.stem for path in (ROOT / "conf" / "annotator").glob("*.yaml"))
# Spaces, escapes and numbers as json.dumps would not write them.
RECORD = b'{ "caption":"a\\u00e9\\/b" , "n": 1.50e3,\n "captions" : ["first", "second"]\t}\n'


def picture(number: int) -> np.ndarray:
    """Four patches of colours of its own."""
    return np.random.default_rng(number).integers(0, 256, (2, 2, 3), np.uint8).repeat(10, axis=0).repeat(12, axis=1)


def sample(number: int) -> dict[str, Any]:
    members = {"png": encoded(picture(number)), "txt": f" text {number}\n", "cls": b"\x00\xff", "json": RECORD}
    return members if number % 3 else members | {"json": {}, "seg.npy": b"old"}


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Three shards of five, one and four samples."""
    numbers = iter(range(10))
    for name, count in (("a", 5), ("b", 1), ("c-0.1", 4)):
        pack(tmp_path / "in" / f"{name}.tar", {f"k{n}": sample(n) for n in (next(numbers) for _ in range(count))})
    return tmp_path / "in"


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return cache(lambda kind: captioner(kind, tmp_path_factory.mktemp(kind)))


class Shout(Annotator):
    """The smallest annotator: what a sample's txt says, loudly. `stop` is called before each batch."""

    def __init__(self, output: str, stop: Any = None, batch_size: int = 2) -> None:
        super().__init__(output, batch_size)
        self.stop, self.batches = stop, 0
        self.prepare = shout

    def annotate(self, raws: list[dict[str, Any]], inputs: list[str]) -> list[dict[str, bytes]]:
        self.batches += 1
        if self.stop is not None:
            self.stop(self.batches)
        return [{"loud": text.encode()} for text in inputs]


def shout(several: list[dict[str, Any]]) -> list[str]:
    if any(sample["txt"] == "text 7" for sample in several):
        raise ValueError("7 is not said")
    return [sample["txt"].upper() for sample in several]


def run(
    annotator: Annotator, source: Any, output: Path, settings: dict[str, Any] | None = None, workers: int = 0
) -> None:
    work = plan(str(source), str(output), settings or {})
    trainer = partial(
        L.Trainer, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    if work.missing:
        annotate(annotator, work, workers, trainer)
    summarize(work)


def tars(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.tar")}


def raws(folder: Path) -> dict[str, dict[str, Any]]:
    return {raw["__key__"]: raw for path in sorted(folder.glob("*.tar")) for raw in read_shard(str(path))}


# ------------------------------------------------------------------------------------------------------------- shards


def test_everything_that_was_there_stays_byte_for_byte(shards: Path, tmp_path: Path) -> None:
    run(Shout(""), shards, tmp_path / "out")
    before, after = raws(shards), raws(tmp_path / "out")
    assert list(after) == [f"k{n}" for n in (0, 1, 2, 3, 4, 5, 6, 8, 9)]  # all but 7, in order
    for key, raw in after.items():
        assert list(raw)[2:] == [*list(before[key])[2:], "loud"]
        assert raw.pop("loud") == f"TEXT {key[1:]}".encode()
        assert {suffix: raw[suffix] for suffix in raw if suffix != "__url__"} == {
            suffix: content for suffix, content in before[key].items() if suffix != "__url__"
        }
    with tarfile.open(tmp_path / "out" / "a.tar") as tar:
        assert {(member.mtime, member.uid, member.uname, member.mode) for member in tar} == {(0, 0, "", 0o644)}


def test_a_member_that_is_there_is_replaced(shards: Path, tmp_path: Path) -> None:
    run(Shout(""), shards, tmp_path / "once")
    run(Shout(""), tmp_path / "once", tmp_path / "twice")
    assert tars(tmp_path / "twice") == tars(tmp_path / "once")


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(workers: int, shards: Path, tmp_path: Path) -> None:
    run(Shout(""), shards, tmp_path / "one")
    run(Shout(""), shards, tmp_path / "other", workers=workers)
    assert tars(tmp_path / "one") == tars(tmp_path / "other")


def test_it_says_what_became_of_all_samples(shards: Path, tmp_path: Path, capsys: Any, caplog: Any) -> None:
    broken = {"k20": {"txt": "x"}, "k21": sample(21), "k22": {"png": b"<html>", "txt": "x"}, "k23": {"txt": "y"}}
    pack(shards / "d.tar", broken)
    pack(shards / "e.tar", {})  # an empty shard is whole
    with caplog.at_level(logging.WARNING):
        run(Shout(""), shards, tmp_path / "out")
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"5 shards written, 0 already there; 10 samples written, 4 broken ones left out: {tmp_path}/out"
    assert len(caplog.messages) == 4
    for key, reason in {"k7": "7 is not said", "k20": "no image", "k22": "cannot identify", "k23": "no image"}.items():
        assert any(f"{key} in {shards}" in line and reason in line for line in caplog.messages)
    run(Shout(""), shards, tmp_path / "out")
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"0 shards written, 5 already there; 0 samples written, 0 broken ones left out: {tmp_path}/out"


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_that_is_cut_off_is_named_and_made_anew_when_it_is_whole(
    workers: int, shards: Path, tmp_path: Path, capsys: Any, caplog: Any
) -> None:
    run(Shout(""), shards, tmp_path / "whole")
    path = shards / "a.tar"
    data = path.read_bytes()
    path.write_bytes(data[: data.index(b"k3.png")])
    (shards / "b.tar").write_bytes(b"<html>404</html>")
    for attempt in range(2):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            run(Shout(""), shards, tmp_path / "out", workers=workers)
        assert set(tars(tmp_path / "out")) == {"a.tar", "c-0.1.tar"}
        assert [raw["__key__"] for raw in read_shard(str(tmp_path / "out" / "a.tar"))] == ["k0", "k1", "k2"]
        assert any(f"a.tar is incomplete, and will be tried again by the next run: shard {path} is broken" in line
                   for line in caplog.messages)  # fmt: skip
        assert any("b.tar was not written" in line for line in caplog.messages)
        last = capsys.readouterr().out.splitlines()[-1]
        assert last.startswith(f"{2 - attempt} shards written, {attempt} already there")
        assert last.endswith("(2 shards are incomplete, see above)")
    path.write_bytes(data)
    (shards / "b.tar").unlink()
    run(Shout(""), shards, tmp_path / "out")
    assert tars(tmp_path / "out") == {k: v for k, v in tars(tmp_path / "whole").items() if k != "b.tar"}


def test_nothing_to_annotate_is_an_error(tmp_path: Path) -> None:
    pack(tmp_path / "in" / "0.tar", {"a": {"txt": "x"}, "b": {"png": b"", "txt": "x"}})
    with pytest.raises(ValueError, match=r"no shard could be annotated: none of the 2 samples of .*0\.tar can be used"):
        run(Shout(""), tmp_path / "in", tmp_path / "out")
    assert not tars(tmp_path / "out")


def full(at: int, batch: int) -> None:
    if batch > at:
        raise OSError("disk full")


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", [0, 3, 4, 5])
def test_a_stopped_run_goes_on_to_the_same_bytes(stop: int, workers: int, shards: Path, tmp_path: Path) -> None:
    run(Shout(""), shards, tmp_path / "whole")
    out = tmp_path / "out"
    with pytest.raises(OSError, match="disk full"):
        run(Shout("", partial(full, stop)), shards, out, workers=workers)
    assert not list(out.glob(".*"))
    whole = tars(tmp_path / "whole")
    finished = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert all(whole[name] == (out / name).read_bytes() for name in finished)
    assert len(finished) < 3
    if workers == 0:
        assert len(finished) == {0: 0, 3: 1, 4: 2, 5: 2}[stop]
    (out / ".a.killed.part").write_bytes(b"half a shard")  # what a killed process cannot tidy up
    annotator = Shout("")
    run(annotator, shards, out, workers=workers)
    assert tars(out) == whole
    assert {name: (out / name).stat().st_mtime_ns for name in finished} == finished
    assert not list(out.glob(".*"))
    again = Shout("")
    run(again, shards, out)
    assert again.batches == 0


def die(batch: int) -> None:
    if batch > 3:
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_run_leaves_whole_shards(shards: Path, tmp_path: Path) -> None:
    run(Shout(""), shards, tmp_path / "whole")
    out = tmp_path / "out"
    process = multiprocessing.get_context("fork").Process(target=run, args=(Shout("", die), shards, out))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert list(tars(out)) == ["a.tar"]
    assert list(out.glob(".b.*.part"))
    run(Shout(""), shards, out)
    assert tars(out) == tars(tmp_path / "whole")
    assert not list(out.glob(".*"))


def test_a_run_that_is_asked_to_end_does(shards: Path, tmp_path: Path) -> None:
    """Lightning notes SIGTERM and goes on when it predicts."""
    with pytest.raises(SystemExit, match="143"):
        run(Shout("", lambda batch: os.kill(os.getpid(), signal.SIGTERM)), shards, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"annotator.json"}


def test_settings_are_those_of_all_shards_of_a_folder(shards: Path, tmp_path: Path) -> None:
    out, settings = tmp_path / "out", {"model": "m", "beams": 5, "output": "here", "batch_size": 2}
    plan(str(shards), str(out), {"model": "mistyped"})  # no shard was made with it
    run(Shout(""), shards, out, settings)
    run(Shout(""), shards, out, settings | {"output": "there", "batch_size": 4})
    with pytest.raises(ValueError, match=r"made with beams=5, not 4; model=m, not n: choose another annotator\.output"):
        plan(str(shards), str(out), {"model": "n", "beams": 4})
    (out / "annotator.json").unlink()
    with pytest.raises(ValueError, match=r"shards without annotator\.json"):
        plan(str(shards), str(out), settings)


def test_wrong_folders_are_told(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is the folder of .*a\.tar, which it would replace"):
        plan(str(shards), str(shards / ".." / "in"), {})
    shutil.copytree(shards, tmp_path / "twin")
    with pytest.raises(ValueError, match=r"in/a\.tar and .*twin/a\.tar would both become .*out/a\.tar"):
        plan([str(shards), str(tmp_path / "twin")], str(tmp_path / "out"), {})
    with pytest.raises(ValueError, match=r"no name that ends in \.tar"):
        plan("pipe:cat shard", str(tmp_path / "out"), {}, allow_pipe=True)
    run(Shout(""), shards, tmp_path / "out")
    pack(tmp_path / "twin" / "a.tar", {"other": sample(99) | {"jpg": b"x" * 9999}})
    with pytest.raises(ValueError, match=r"out/a\.tar was made from a shard of .* choose another annotator\.output"):
        plan(str(tmp_path / "twin"), str(tmp_path / "out"), {})


def test_pipes_are_named_by_their_shard(shards: Path, tmp_path: Path) -> None:
    work = plan(f"pipe:cat {shards}/a.tar | cat", str(tmp_path / "out"), {}, allow_pipe=True)
    assert work.missing == ["a"]
    assert plan("https://host/x/0.1.tar?k=b/c", str(tmp_path / "out"), {}).missing == ["0.1"]


# ------------------------------------------------------------------------------------------------------------ captions


def captions(model: str, prompt: str | None, **changed: Any) -> Captions:
    arguments = {"output": "", "batch_size": 3, "model": model, "revision": None, "trust_remote_code": False,
                 "dtype": "fp32", "prompt": prompt, "key": "captions", "captions": 3, "beams": 4, "min_new_tokens": 2,
                 "max_new_tokens": 6}  # fmt: skip
    return Captions(**(arguments | changed))


def said(model: str, kind: str, prompt: str | None, image: Image.Image) -> list[str]:
    """What this kind of model says of one picture, each asked as its own documentation does."""
    words, network = AutoProcessor.from_pretrained(model), AutoModelForImageTextToText.from_pretrained(model).eval()
    if kind == "llava":
        inputs = words(images=image, text=f"user <image> {prompt} bot", return_tensors="pt")
    elif kind == "git" and prompt is not None:
        ids = [words.tokenizer.cls_token_id, *words.tokenizer(prompt, add_special_tokens=False).input_ids]
        inputs = {**words(images=image, return_tensors="pt"), "input_ids": torch.tensor([ids])}
    else:
        inputs = words(images=image, **({"text": prompt} if prompt else {}), return_tensors="pt")
    new = {"blip": 4, "blip2-opt": 3 + 4, "blip2-t5": 1, "git": 4, "llava": 1 + 1 + 4 + 4}[kind] if prompt else 0
    with torch.no_grad():
        output = network.generate(
            **inputs, num_beams=4, num_return_sequences=3, min_new_tokens=2, max_new_tokens=6, do_sample=False
        )
    return [text.strip() for text in words.batch_decode(output[:, new:], skip_special_tokens=True)]


@pytest.mark.parametrize(
    ("kind", "prompt"),
    [*((kind, prompt) for kind in KINDS[:-1] for prompt in (None, "a photo of")), ("llava", "what is this")],
)
def test_captions_are_those_of_each_picture_alone(kind: str, prompt: Any, model_folder: Any, shards: Path) -> None:
    out = shards.parent / "out"
    run(captions(model_folder(kind), prompt), shards, out)
    found = raws(out)
    assert len(found) == 10
    for number in range(10):
        several = json.loads(found[f"k{number}"]["json"])["captions"]
        if number < 4:
            assert several == said(model_folder(kind), kind, prompt, Image.fromarray(picture(number)))
        assert len(several) == 3
        assert all(len(text.split()) <= 6 for text in several)
    assert len({tuple(json.loads(raw["json"])["captions"]) for raw in found.values()}) > 1


def test_all_of_a_json_but_the_captions_stays(model_folder: Any, shards: Path) -> None:
    out = shards.parent / "out"
    run(captions(model_folder("git"), None, key="said"), shards, out)
    before, after = raws(shards), raws(out)
    for key, raw in after.items():
        assert list(raw) == list(before[key])
        assert all(raw[suffix] == before[key][suffix] for suffix in ("png", "txt", "cls"))
    start = RECORD[: RECORD.index(b"\t")]
    assert after["k1"]["json"].startswith(start + b', "said": ["')
    assert after["k1"]["json"].endswith(b'"]\t}\n')


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('{}', '{"c": [1]}'),
        (' { } ', ' {"c": [1] } '),
        ('{"a": {"c": 2}}', '{"a": {"c": 2}, "c": [1]}'),
        ('{"c" : "x, }", "b":1}', '{"c": [1], "b":1}'),
        ('{"a":"\\"c\\":" ,"c":[2,\n[3]] }', '{"a":"\\"c\\":" ,"c": [1] }'),
        ('{"ü": 1.50, "c":null}', '{"ü": 1.50, "c": [1]}'),
    ],
)  # fmt: skip
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_key_is_set_in_a_json(before: str, after: str, encoding: str) -> None:
    data = before.encode(encoding)
    assert with_key(data, "c", [1]).decode(encoding) == after
    assert json.loads(with_key(data, "c", [1])) == json.loads(data) | {"c": [1]}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"beams": 2}, r"annotator\.beams=2 .*annotator\.captions=3.*set annotator\.beams=3"),
        ({"captions": 0}, r"annotator\.captions=0"),
        ({"dtype": "float"}, r"annotator\.dtype=float: choose fp32"),
        ({"batch_size": 0}, r"annotator\.batch_size=0"),
        ({"model": "nowhere/nothing"}, r"annotator\.model=nowhere/nothing cannot be loaded \("),
        ({"model": "llava", "prompt": None}, r"annotator\.model=.*set annotator\.prompt="),
        ({"model": "tests"}, r"annotator\.model=tests cannot be loaded \(.*folder that holds one"),
    ],
)
def test_mistakes_are_told(changed: Any, message: str, model_folder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    if changed.get("model") == "llava":
        changed = changed | {"model": model_folder("llava")}
    with pytest.raises(ValueError, match=message):
        captions(**({"model": "nowhere", "prompt": "a"} | changed))


def test_code_of_a_model_runs_only_where_it_is_trusted(
    model_folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder, ran = shutil.copytree(model_folder("git"), tmp_path / "model"), tmp_path / "ran"
    (folder / "own.py").write_text(f"open({str(ran)!r}, 'w').close()\nclass Config: pass\nclass Model: pass\n")
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "own"}
    config["auto_map"] = {"AutoConfig": "own.Config", "AutoModelForImageTextToText": "own.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="trust_remote_code"):
        captions(str(folder), None)
    assert not ran.exists()
    with pytest.raises((ValueError, AttributeError)):  # it is no model, but it is asked
        captions(str(folder), None, trust_remote_code=True)
    assert ran.exists()


def test_half_precision_is_that_of_the_model(model_folder: Any) -> None:
    annotator = captions(model_folder("blip2-opt"), None, dtype="bf16")
    assert annotator.model.vision_model.dtype == torch.bfloat16
    members = annotator.annotate([{}], annotator.prepare([{"image": Image.fromarray(picture(0))}]))
    assert len(json.loads(members[0]["json"])["captions"]) == 3


# ------------------------------------------------------------------------------------------------------------ features


@pytest.fixture
def clip(clip_folder: str) -> Backbone:
    torch.manual_seed(0)
    backbone = Backbone(clip_folder, pretrained="random")
    torch.nn.init.normal_(backbone.text.get_parameter("token_embedding.weight"))
    return backbone


@pytest.fixture
def texts_of(tmp_path: Path) -> Path:
    """Shards whose samples have captions; the raw one is among them for some."""
    for shard in range(2):
        members = {}
        for n in range(shard * 5, shard * 5 + 5):
            record = {
                "captions": [f" caption {i} of {n}" for i in range(n % 3 + 2)] + ["raw 2"],
                "long": f"Long {n}. So.",
            }
            members[f"k{n}"] = {"png": encoded(picture(n)), "txt": f"raw {n}", "json": record}
        pack(tmp_path / "in" / f"{shard}.tar", members)
    return tmp_path / "in"


def test_features_are_those_of_the_scores(clip: Backbone, texts_of: Path, tmp_path: Path) -> None:
    run(Features("", 3, clip, ["captions", "long"]), texts_of, tmp_path / "out")
    with scoring(clip):
        for raw in raws(tmp_path / "out").values():
            found = decode(raw)
            with np.load(io.BytesIO(raw["features.npz"]), allow_pickle=False) as stored:
                assert stored["image"].dtype == stored["text"].dtype == np.float16
                expected = [found["txt"], *(text.strip() for text in found["json"]["captions"]), found["json"]["long"]]
                assert stored["strings"].tolist() == list(dict.fromkeys(expected))
                image = embed_images(clip, square(found["image"], clip.image_size)[None])[0]
                text = embed_texts(clip, stored["strings"].tolist())
                assert torch.allclose(torch.from_numpy(stored["image"]).float(), image, atol=5e-4)
                assert torch.allclose(torch.from_numpy(stored["text"]).float(), text, atol=5e-4)
                assert torch.allclose(text.norm(dim=-1), torch.ones(len(text)))


def test_training_reads_them_back_for_what_it_draws(clip: Backbone, texts_of: Path, tmp_path: Path) -> None:
    run(Features("", 3, clip, ["captions"]), texts_of, tmp_path / "out")
    texts = {
        "caption": {"key": "txt", "pick": "one"},
        "captions": {"key": "captions", "pick": "random", "k": 4},
        "short": {"key": "long", "pick": "first_sentence"},
    }
    sizes = {"batch_size": 4, "workers": 0, "shuffle": 0, "seed": 0, "needs": Needs(32)}
    data = ShardData(str(tmp_path / "out"), None, texts, features="features.npz", **sizes)
    plain = ShardData(str(tmp_path / "out"), None, texts, **sizes)
    for each in (data, plain):
        each.setup("fit")
    loaders = zip(data.train_dataloader(), plain.train_dataloader(), range(3), strict=False)
    for batch, other, _ in loaders:
        features = batch.pop("features")
        assert "features" not in other
        assert {name: part for name, part in batch.items() if name != "image"} == {
            name: part for name, part in other.items() if name != "image"
        }
        assert features.keys() == {"image", "caption", "captions"}
        with scoring(clip):
            assert torch.allclose(
                features["image"], embed_images(clip, data.on_after_batch_transfer(batch, 0)["image"]), atol=5e-4
            )
            for name in ("caption", "captions"):
                assert features[name].dtype == torch.float32
                assert torch.allclose(features[name], embed_texts(clip, batch[name]), atol=5e-4)


def test_a_sample_without_the_texts_asked_for_is_left_out(clip: Backbone, texts_of: Path, tmp_path: Path) -> None:
    pack(texts_of / "2.tar", {"x": {"png": encoded(picture(0)), "txt": "raw"}, "y": {"png": encoded(picture(0))}})
    run(Features("", 3, clip, ["captions"]), texts_of, tmp_path / "out")
    assert set(tars(tmp_path / "out")) == {"0.tar", "1.tar"}
    run(Features("", 3, clip, []), texts_of, tmp_path / "raw")
    assert list(raws(tmp_path / "raw")) == [*(f"k{n}" for n in range(10)), "x"]


# ------------------------------------------------------------------------------------------------------------- latents


@pytest.fixture
def smaller(generator_folder: str, tmp_path: Path) -> str:
    """A generator with an `AutoencoderKL`, of 16 px pictures where the small CLIP sees 32."""
    folder = tmp_path / "smaller"
    shutil.copytree(generator_folder, folder)
    shutil.rmtree(folder / "vae")
    torch.manual_seed(0)
    AutoencoderKL(
        latent_channels=4, scaling_factor=0.18215, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    ).save_pretrained(folder / "vae")  # fmt: skip
    return str(folder)


@pytest.fixture
def larger(generator_folder: str, tmp_path: Path) -> str:
    """A generator of 48 px pictures."""
    folder = tmp_path / "larger"
    shutil.copytree(generator_folder, folder)
    config = json.loads((folder / "unet/config.json").read_text())
    (folder / "unet/config.json").write_text(json.dumps(config | {"sample_size": 12}))
    return str(folder)


def reading(folder: Path, diffusion: Diffusion, image_size: int = 32, **changed: Any) -> ShardData:
    """The data of a run that reads stored latents, as `__main__` makes them."""
    needs = Needs(image_size, latents=partial(diffusion.latents_of, image_size))
    sizes = {"batch_size": 4, "workers": 0, "shuffle": 0, "seed": 0}
    texts = {"caption": {"key": "txt", "pick": "one"}}
    stored = {"latents": "latent.npz", "needs": needs}
    data = ShardData(str(folder), **({"selection": None, "texts": texts} | sizes | stored | changed))
    data.setup("fit")
    return data


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["larger", "smaller"])
def test_stored_latents_are_those_of_training(
    kind: str, dtype: Any, clip: Backbone, larger: str, smaller: str, shards: Path, tmp_path: Path
) -> None:
    """Two passes in other batches than those they were computed in; half keeps 11 bits, bf16 8."""
    path, size = {"larger": (larger, 48), "smaller": (smaller, 32)}[kind]
    run(Latents("", 3, Diffusion(path, dtype=dtype), clip), shards, tmp_path / "out")
    diffusion = Diffusion(path, dtype=dtype)
    data = reading(tmp_path / "out", diffusion, size, selection=str(shards))
    keys = []
    for batch, _ in zip(data.train_dataloader(), range(5), strict=False):
        keys += batch["key"]
        assert batch["image"].shape == (4, 3, size, size)
        assert batch["latents"].dtype == torch.float32
        expected = diffusion.encode(data.on_after_batch_transfer(batch, 0)["image"])
        torch.testing.assert_close(batch["latents"], expected, rtol=2 ** -{"fp32": 11, "bf16": 8}[dtype], atol=1e-5)
        assert expected.std(dim=0).mean() > 0.01  # they tell pictures apart
    assert [keys.count(f"k{number}") for number in range(10)] == [2] * 10
    assert all("latents" not in batch for batch in data.val_dataloader())


class Fails(Latents):
    def annotate(self, raws: Any, inputs: Any) -> Any:
        full(2, self.trainer.predict_loop.batch_progress.current.ready)
        return super().annotate(raws, inputs)


def test_a_stopped_run_goes_on_to_the_same_latents(
    clip: Backbone, generator_folder: str, shards: Path, tmp_path: Path
) -> None:
    run(Latents("", 3, Diffusion(generator_folder), clip), shards, tmp_path / "whole")
    with pytest.raises(OSError, match="disk full"):
        run(Fails("", 3, Diffusion(generator_folder), clip), shards, tmp_path / "out")
    finished = tars(tmp_path / "out")
    assert 0 < len(finished) < 3
    run(Latents("", 3, Diffusion(generator_folder), clip), shards, tmp_path / "out")
    assert tars(tmp_path / "out") == tars(tmp_path / "whole")


def test_a_picture_that_was_changed_is_broken(
    clip: Backbone, generator_folder: str, shards: Path, tmp_path: Path, caplog: Any
) -> None:
    diffusion = Diffusion(generator_folder)
    run(Latents("", 3, diffusion, clip), shards, tmp_path / "out")
    members = {
        key: {name: part for name, part in raw.items() if name[0] != "_"} for key, raw in raws(tmp_path / "out").items()
    }
    members["k0"]["png"] = encoded(picture(0) ^ 1)  # also the first of a shard, which is looked at before training
    members["k2"]["latent.npz"] = members["k2"]["latent.npz"][:-30]
    pack(tmp_path / "changed" / "0.tar", members)
    with caplog.at_level(logging.DEBUG, "clipfix.data.stream"):
        batch = next(iter(reading(tmp_path / "changed", diffusion, batch_size=8).train_dataloader()))
    assert not {"k0", "k2"} & set(batch["key"])
    assert batch["skipped"] >= 1
    assert any(
        "k0 in" in line and "its picture is not the one" in line and "latent.npz" in line for line in caplog.messages
    )


def test_latents_of_something_else_are_refused_before_training(
    clip: Backbone, generator_folder: str, smaller: str, shards: Path, tmp_path: Path
) -> None:
    out, diffusion = tmp_path / "out", Diffusion(generator_folder)
    run(Latents("", 3, diffusion, clip), shards, out)
    reading(out, Diffusion(generator_folder))
    refused = r"out/a\.tar has latents of PatchPCA \w+ in float32, 32 px pictures at 32 px, but this run needs those of"
    remedy = r".*annotator=latents .*data\.latents=null"
    with pytest.raises(ValueError, match=f"{refused} PatchPCA .*, 48 px pictures at 32 px: {remedy}"):
        reading(out, diffusion, 48)
    with pytest.raises(ValueError, match=f"{refused} AutoencoderKL .*, 32 px pictures at 16 px: {remedy}"):
        reading(out, Diffusion(smaller))
    with pytest.raises(ValueError, match=f"{refused} PatchPCA .* in bfloat16"):
        reading(out, Diffusion(generator_folder, dtype="bf16"))
    trained = Diffusion(generator_folder)
    trained.vae.encoder.bias.data[0] += 1e-3
    with pytest.raises(ValueError, match=refused):
        reading(out, trained)
    scaled = Diffusion(generator_folder)
    scaled.vae.register_to_config(scaling_factor=0.5)
    with pytest.raises(ValueError, match=refused):
        reading(out, scaled)
    with pytest.raises(ValueError, match=r"in/a\.tar has no latent\.npz: .*annotator=latents"):
        reading(shards, diffusion)
    # Where only part of a shard is of another one, its samples are as good as broken.
    run(Latents("", 3, trained, clip), shards, tmp_path / "other")
    mixed = {**raws(out), "k3": raws(tmp_path / "other")["k3"]}
    members = {key: {name: part for name, part in raw.items() if name[0] != "_"} for key, raw in mixed.items()}
    pack(tmp_path / "mixed" / "0.tar", members)
    keys = next(iter(reading(tmp_path / "mixed", diffusion, batch_size=9).train_dataloader()))["key"]
    assert len(keys) == 9
    assert "k3" not in keys  # another one has its place


# ---------------------------------------------------------------------------------------------------------- front door


@pytest.fixture
def clipfix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    def command(*arguments: str) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["clipfix", "run=annotate", "trainer=cpu", "data.workers=0", *arguments])
        monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
        main()

    return command


@pytest.mark.parametrize("name", CHOICES)
def test_yaml_binds_to_the_constructor(name: str) -> None:
    config = yaml.safe_load((ROOT / "conf" / "annotator" / f"{name}.yaml").read_text())
    parameters = inspect.signature(get_class(config.pop("_target_")).__init__).parameters
    assert config.pop("_convert_") == "all"
    assert config.keys() == parameters.keys() - {"self"}
    assert all(parameter.default is inspect.Parameter.empty for parameter in parameters.values())


def test_the_command(clipfix: Any, model_folder: Any, tmp_path: Path, capsys: Any) -> None:
    """From the drawn world to captions, and from captions to features."""
    sizes = {"train": 12, "selection": 2, "test": 2, "pairs_train": 0, "pairs_selection": 1, "pairs_test": 1}
    world = [f"data.prepare.{key}={value}" for key, value in (sizes | {"summaries_test": 1, "processes": 1}).items()]
    model = [f"annotator.model={model_folder('git')}", "annotator.dtype=fp32"]
    clipfix(*world, *model, "annotator.output=captioned", "data.train=data/scenes/train-*.tar")
    printed = capsys.readouterr().out.splitlines()
    assert any(line.startswith("annotating") and "1/1 shards, 12 samples" in line for line in printed)
    assert printed[-1] == "1 shards written, 0 already there; 12 samples written, 0 broken ones left out: captioned"
    clipfix("data.prepare=null", "data.train=captioned", "annotator=features", "annotator.output=featured")
    assert capsys.readouterr().out.splitlines()[-1].startswith("1 shards written")
    assert not list(tmp_path.glob("outputs/*/*"))  # no run folder, no logs
    found = list(samples("featured"))
    assert all(len(sample["json"]["captions"]) == 5 for sample in found)
    assert len(found) == 12


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["data=shards", "eval=none"], ["Not set: data.train, annotator.output"]),
        (["data.prepare=null", "data.train=in", "annotator.output=in"], ["is the folder of in/a.tar"]),
        (["data.prepare=null", "data.train=in", "annotator.output=out", "annotator.beams=4"], ["annotator.beams=5"]),
        (["data.prepare=null", "data.train=in", "annotator.output=out", "annotator.beam=4"], ["annotator.beams"]),
        (["annotator=depths", "annotator.output=out"], ["captions", "features", "latents"]),
    ],
)
def test_the_command_says_what_is_wrong(arguments: list[str], words: list[str], clipfix: Any, shards: Path) -> None:
    with pytest.raises(SystemExit) as exit_:
        clipfix(*arguments)
    assert all(word in str(exit_.value.code) for word in words), exit_.value.code


def rank(number: int, port: int, command: Any, arguments: list[str]) -> None:
    """One process of two, as torchrun starts them."""
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "0"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    rank_zero_only.rank = number
    command(*arguments)


def test_two_processes_write_what_one_writes(
    model_folder: Any, clipfix: Any, shards: Path, tmp_path: Path, capfd: Any
) -> None:
    arguments = ["data.prepare=null", "data.train=in", f"annotator.model={model_folder('blip2-opt')}"]
    arguments += ["annotator.dtype=fp32", "annotator.batch_size=2"]
    clipfix(*arguments, "annotator.output=one")
    capfd.readouterr()
    two = [*arguments, "annotator.output=two", "trainer.devices=2", "trainer.strategy=ddp", "data.workers=1"]
    port = free_port()
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=rank, args=(number, port, clipfix, two)) for number in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    printed = capfd.readouterr().out
    assert printed.count("3 shards written, 0 already there; 10 samples written") == 1
    assert tars(tmp_path / "one") == tars(tmp_path / "two")
    assert len(tars(tmp_path / "two")) == 3
