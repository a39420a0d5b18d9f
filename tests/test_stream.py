"""A stream that loses and doubles nothing, whatever it meets."""

import itertools
import pickle
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image
from shards import encoded, numbered, pack, picture
from streams import BROKEN, passes, shard_data, stream

from clipfix.data.needs import Needs


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("kind", ["local", "streamed"])
def test_a_broken_sample_is_skipped_and_counted(
    kind: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stream goes on with the next sample. In the order of an index another sample takes its place."""
    if name == "bomb":
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100 * 100 - 1)
    key = "caption" if "surrogate" in name else "txt"
    good = {"png": encoded(picture(0)), "txt": "fine", "json": {"caption": "fine"}}
    pack(tmp_path / "0.tar", {"0": BROKEN[name], "1": good, "2": BROKEN[name], "3": BROKEN[name], "4": good})
    texts = {"caption": {"key": key, "pick": "one"}}
    where = str(tmp_path) if kind == "local" else f"pipe:cat {tmp_path}/0.tar"
    data = shard_data(where, texts=texts, shuffle=0, batch_size=1, allow_pipe=True)
    if kind == "streamed":
        batches = list(itertools.islice(data.train_dataloader(), 4))
        assert [batch["key"] for batch in batches] == [["1"], ["4"], ["1"], ["4"]]
        assert [batch["skipped"] for batch in batches] == [1, 2, 1, 2]
        assert [batch["position"] for batch in batches] == [(0, 0, 2), (0, 0, 5), (0, 1, 2), (0, 1, 5)]
        return
    batches = list(itertools.islice(data.train_dataloader(), 10))
    assert [batch["position"] for batch in batches] == [(n + 1, n // 5, n % 5 + 1) for n in range(10)]
    for number, batch in enumerate(batches):
        assert batch["key"][0] in "14"
        assert (batch["skipped"] > 0) == (number % 5 in (0, 2, 3))
        if not batch["skipped"]:
            assert batch["key"] == [str(number % 5)]


@pytest.mark.parametrize("pick", ["one", "first_sentence", "other_sentences"])
def test_a_sample_without_the_text_asked_for_is_skipped_and_counted(pick: str, tmp_path: Path) -> None:
    members = {
        str(key): {"png": encoded(picture(key)), "txt": "x", "json": record}
        for key, record in enumerate([{"long": "a. b"}, {"caption": "c"}, {"long": " "}, {"long": "d. e"}])
    }
    pack(tmp_path / "0.tar", members)
    texts = {"caption": {"key": "long", "pick": pick}}
    loader = shard_data(str(tmp_path), texts=texts, shuffle=0, batch_size=2).train_dataloader()
    batches = list(itertools.islice(loader, 2))
    assert {key for batch in batches for key in batch["key"]} == {"0", "3"}
    assert (batches[0]["key"][0], batches[1]["key"][1]) == ("0", "3")
    assert all(batch["skipped"] >= 1 for batch in batches)


@pytest.mark.parametrize("workers", [0, 1])
def test_shards_without_a_usable_sample_stop_the_run_and_say_why(workers: int, tmp_path: Path) -> None:
    numbered(tmp_path, [3])
    data = shard_data(str(tmp_path), texts={"caption": {"key": "Long", "pick": "one"}}, workers=workers)
    with pytest.raises(ValueError, match=r"no usable sample in an entire pass.*no text under 'Long' .*caption, long"):
        next(iter(data.train_dataloader()))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_selection_split_without_a_usable_sample_says_so(workers: int, tmp_path: Path) -> None:
    numbered(tmp_path, [3])
    texts = {"caption": {"key": "Long", "pick": "one"}}
    data = shard_data(str(tmp_path), selection=str(tmp_path), texts=texts, workers=workers)
    with pytest.raises(ValueError, match=r"no shard of data\.selection \(1\) has one.*no text under 'Long'"):
        list(data.val_dataloader())


def test_a_worker_without_a_usable_sample_of_the_selection_split_has_none(tmp_path: Path) -> None:
    members = {str(key): {"png": encoded(picture(key)), "txt": "x" if key else " "} for key in range(3)}
    pack(tmp_path / "0.tar", members)
    loader = shard_data(str(tmp_path), selection=str(tmp_path), workers=4).val_dataloader()
    assert [key for batch in loader for key in batch["key"]] == ["1", "2"]


def test_a_wrong_key_of_large_data_is_told_before_a_whole_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    numbered(tmp_path, [50, 50])
    monkeypatch.setattr("clipfix.data.stream.CHECK_AFTER", 4)
    data = shard_data(str(tmp_path), texts={"caption": {"key": "Long", "pick": "one"}})
    with pytest.raises(ValueError, match=r"no usable sample in 4 in a row, and no shard of data.train .*'Long'"):
        next(iter(data.train_dataloader()))


def test_more_workers_than_samples_are_told_what_to_lower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    numbered(tmp_path, [2])
    for worker, has_one in enumerate((True, True, False)):
        monkeypatch.setattr(
            "clipfix.data.stream.get_worker_info", lambda id=worker: SimpleNamespace(id=id, num_workers=3)
        )
        samples = iter(stream(tmp_path, workers=3))
        if has_one:
            assert len(list(itertools.islice(samples, 5))) == 5
        else:
            with pytest.raises(ValueError, match=r"data\.train .*3 workers: lower data\.workers"):
                next(samples)


def gone(shard: Path) -> None:
    shard.unlink()


def without_texts(shard: Path) -> None:
    pack(shard, {str(number): {"png": encoded(picture(number))} for number in range(4)})


@pytest.mark.parametrize("spoil", [gone, without_texts])
def test_a_worker_goes_on_after_passes_that_gave_it_a_broken_shard_alone(spoil: Any, tmp_path: Path) -> None:
    """A third of all passes, and several in a row: what they lack is dealt to others."""
    keys = numbered(tmp_path, [4, 4, 4])
    ranks = [stream(tmp_path, rank=rank, world=3) for rank in range(3)]
    spoil(tmp_path / "00001.tar")
    for rank in ranks:
        found = list(itertools.islice(rank, 160))
        numbers = [number for _, number, _ in (sample["position"] for sample in found)]
        steps = [after - before for before, after in itertools.pairwise(numbers)]
        assert max(steps) > 2  # two passes or more were nothing to it
        assert {sample["key"] for sample in found} == set(keys[:4] + keys[8:])


def test_a_run_whose_shards_all_vanish_stops_after_one_pass(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    numbered(tmp_path, [4, 4, 4])
    data = shard_data(str(tmp_path))
    data.index()
    for path in tmp_path.glob("*.tar"):
        path.unlink()
    with pytest.raises(ValueError, match=r"no shard of data.train .3. begins with one.*00002\.tar: .*No such file"):
        next(iter(data.train_dataloader()))
    assert len(caplog.messages) == 3


class Precise(L.LightningModule):
    """Writes down the pictures that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.given: list[torch.Tensor] = []

    def training_step(self, batch: dict[str, Any], index: int) -> torch.Tensor:
        self.given.append(batch["image"])
        return self.weight * batch["image"].mean()

    def validation_step(self, batch: dict[str, Any], index: int) -> None:
        self.given.append(batch["image"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize(
    ("precision", "dtype"), [("32-true", torch.float32), ("64-true", torch.float64), ("bf16-true", torch.bfloat16)]
)
def test_a_method_is_given_floats_of_the_precision_it_trains_in(precision: Any, dtype: Any, tmp_path: Path) -> None:
    numbered(tmp_path, [4])
    trainer = L.Trainer(
        max_steps=1,
        precision=precision,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module := Precise(), shard_data(str(tmp_path), selection=str(tmp_path), batch_size=4))
    assert len(module.given) == 2  # a look at validation, and a step
    for images in module.given:
        expected = torch.tensor([[number, 0, 128] for number in range(4)]).float().div(255).to(dtype)
        assert images.dtype == dtype
        assert torch.equal(images.sort(dim=0).values[:, :, 0, 0], expected)


@pytest.mark.parametrize("counts", [[7], [5, 0, 9], [3, 1, 4, 1, 5, 9, 2, 6]], ids=str)
@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_every_sample_once_a_pass(
    counts: list[int], world: int, workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = numbered(tmp_path, counts)
    endless: list[list[str]] = [[], [], []]
    single: list[str] = []
    for rank, worker in itertools.product(range(world), range(max(workers, 1))):
        info = SimpleNamespace(id=worker, num_workers=workers) if workers else None
        monkeypatch.setattr("clipfix.data.stream.get_worker_info", lambda info=info: info)
        for number, part in enumerate(passes(stream(tmp_path, rank=rank, world=world, workers=workers), 3)):
            endless[number] += part
        single += [sample["key"] for sample in stream(tmp_path, rank=rank, world=world, endless=False)]
    assert [sorted(part) for part in (*endless, single)] == [keys] * 4


def test_shuffling_is_seeded_and_new_in_every_pass(tmp_path: Path) -> None:
    keys = numbered(tmp_path, [10, 10, 10])
    here = passes(stream(tmp_path, shuffle=8), 3)
    assert here == passes(pickle.loads(pickle.dumps(stream(tmp_path, shuffle=8))), 3)  # as a spawned worker gets it
    orders = [*here, *passes(stream(tmp_path, shuffle=8, seed=1), 3)]
    assert len({tuple(order) for order in orders}) == 6
    whole = passes(stream(tmp_path, shuffle=1000), 1)[0]  # a buffer larger than the data shuffles all of it
    assert {int(key) // 10 for key in whole[:10]} == {0, 1, 2}
    assert sorted(whole) == keys


def test_without_shuffling_shards_change_places_but_keep_their_order(tmp_path: Path) -> None:
    numbered(tmp_path, [4, 4, 4, 4, 4])
    first, second = passes(stream(tmp_path, shuffle=0), 2)
    for order in (first, second):
        shards = [order[place : place + 4] for place in range(0, 20, 4)]
        assert all(shard == sorted(shard) for shard in shards)
        assert len({int(shard[0]) // 4 for shard in shards}) == 5
    assert first != second


def test_selection_is_one_pass_in_stored_order_with_its_last_partial_batch(tmp_path: Path) -> None:
    numbered(tmp_path / "train", [9])
    keys = numbered(tmp_path / "selection", [4, 3])
    data = shard_data(str(tmp_path / "train"), selection=str(tmp_path / "selection"), workers=1)
    loader = data.val_dataloader()
    for _ in range(2):
        batches = list(loader)
        assert [len(batch["key"]) for batch in batches] == [3, 3, 1]
        assert [key for batch in batches for key in batch["key"]] == keys
    assert shard_data(str(tmp_path / "train")).val_dataloader() == []


def test_prepare_makes_the_shards(tmp_path: Path) -> None:
    data = shard_data(str(tmp_path / "new"), prepare=lambda: numbered(tmp_path / "new", [3]))
    assert len(next(iter(data.train_dataloader()))["key"]) == 3


class Marked:
    """A transform that writes three draws, one of each global generator, into a picture of one colour."""

    def __call__(self, picture: Image.Image) -> Image.Image:
        draws = torch.randint(256, ()).item(), np.random.randint(256), random.randrange(256)
        return Image.new("RGB", picture.size, draws)


def test_augmentation_is_drawn_anew_in_each_pass_the_same_in_each_run_and_never_in_selection(tmp_path):
    numbered(tmp_path, [4])
    colours = []
    for seed in (0, 0, 1):
        state = torch.get_rng_state()
        data = shard_data(str(tmp_path), selection=str(tmp_path), augment=Marked(), batch_size=4, seed=seed)
        first, second = itertools.islice(data.train_dataloader(), 2)
        colours.append([dict(zip(b["key"], b["image"][:, :, 0, 0].tolist(), strict=True)) for b in (first, second)])
        (plain,) = data.val_dataloader()
        assert all(colour not in colours[-1][0].values() for colour in plain["image"][:, :, 0, 0].tolist())
        assert torch.equal(torch.get_rng_state(), state)
    assert colours[0] == colours[1]
    assert colours[0] != colours[2]
    assert all(colours[0][0][key] != colours[0][1][key] for key in colours[0][0])
    with pytest.raises(ValueError, match=r"data\.augment .* latent\.npz"):
        shard_data(str(tmp_path), augment=Marked(), latents="latent.npz", needs=Needs(16, latents=lambda: "x"))
