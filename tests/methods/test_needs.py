"""What a method declares is what the loader's workers bring: token ids above all."""

import pickle
from types import SimpleNamespace

import pytest
import torch
from shards import numbered
from small import METHODS, batch, build

from clipfix.data.module import ShardData
from clipfix.data.needs import Needs
from clipfix.methods.base import Method

TEXTS = {
    "caption": {"key": "txt", "pick": "one"},
    "captions": {"key": "captions", "pick": "all", "k": 2},
    "long": {"key": "long", "pick": "one"},
}


def loaded(method: Method, folder: str, workers: int) -> dict:
    """The first batch, as it comes to the training step."""
    data = ShardData(folder, None, TEXTS, batch_size=8, workers=workers, shuffle=0, seed=0, needs=method.needs)
    data.setup()
    return data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("name", METHODS)
def test_a_step_tokenizes_nothing_and_is_the_same(name, workers, clip_folder, generator_folder, tmp_path, monkeypatch):
    """The loss of a batch with token ids is, to the bit, that of its strings; and no tokenizer is asked for it."""
    numbered(tmp_path, [16])
    method = build(name, clip_folder, generator_folder)
    inputs = loaded(method, str(tmp_path), workers)
    plain = {key: value for key, value in inputs.items() if key not in ("tokens", "reference_tokens", "prompt")}
    assert method.needs.encode == () or len(plain) < len(inputs)

    def total(entries: dict) -> torch.Tensor:
        method.seed_draws(0)
        return torch.stack(list(method.loss(entries).values())).sum().detach()

    expected = total(plain)

    def refused(*_: object) -> None:
        raise AssertionError("a text was tokenized in the training process")

    for clip in [module for module in method.modules() if hasattr(module, "tokenize")]:
        monkeypatch.setattr(clip, "tokenize", refused)
    assert torch.equal(total(inputs), expected)


@pytest.mark.parametrize("name", METHODS)
def test_what_workers_run_holds_no_model(name, clip_folder, generator_folder):
    needs = build(name, clip_folder, generator_folder).needs
    assert len(pickle.dumps(needs.encode)) < 8e6  # vocabulary and merges, no weights
    for encode in pickle.loads(pickle.dumps(needs.encode)):
        again = encode(batch(4))
        for key, made in encode(batch(4)).items():
            tensors = made.items() if isinstance(made, dict) else [(key, made)]
            for part, value in tensors:
                other = again[key][part] if isinstance(made, dict) else again[key]
                assert torch.equal(torch.as_tensor(value), torch.as_tensor(other))


def test_a_text_that_the_data_lacks_is_named_before_anything_runs(tmp_path):
    texts = {name: text for name, text in TEXTS.items() if name != "long"}
    with pytest.raises(ValueError, match=r"reads data\.texts\.long.*data\.texts\.long=\{key: long"):
        ShardData(str(tmp_path), None, texts, 1, 0, 0, seed=0, needs=Needs(16, ("caption", "long")))


def test_one_reduction_for_all_values_every_few_steps(clip_folder, generator_folder, monkeypatch):
    """Eight notes and two losses were ten reductions in every step, each of which makes all ranks wait."""
    method = build("fff", clip_folder, generator_folder)
    reduced, logged = [], []
    strategy = SimpleNamespace(reduce=lambda values, reduce_op: reduced.append((values, reduce_op)) or values / 2)
    trainer = SimpleNamespace(log_every_n_steps=3, strategy=strategy, global_step=0, precision="32-true")
    method._trainer = trainer
    monkeypatch.setattr(
        method, "log", lambda name, value, **how: logged.append((trainer.global_step, name, value, how))
    )
    for step in range(7):
        trainer.global_step = step
        method.training_step(batch(8, step), step)
    assert [step for step, name, *_ in logged if name == "train/loss"] == [0, 2, 5]  # the bar's first, then every third
    assert len(reduced) == 3
    names = [name for step, name, *_ in logged if step == 2]
    assert {"train/sigmoid", "train/loss", "positives/together_per_image"} <= set(names)
    values, operation = reduced[1]
    assert operation == "mean"
    assert len(values) == len(names)
    assert all(not how["sync_dist"] for *_, how in logged)
    assert torch.equal(torch.stack([value for step, _, value, _ in logged if step == 2]), values / 2)
