"""Scores must not leave a trace: neither in the model nor in the randomness of the run around them."""

import random
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from planted import Planted, write_shard

from clipfix.evals import Benchmark, evaluate
from clipfix.evals.embed import embed_texts, scoring
from clipfix.evals.retrieval import Retrieval
from clipfix.evals.selection import Selection

CONF = Path(__file__).parents[2] / "conf" / "eval"


@pytest.fixture
def backbone():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(20, 16, generator=generator)
    return Planted(images, {f"picture {i}": torch.randn(16, generator=generator) for i in range(20)})


@pytest.fixture
def benchmark(tmp_path):
    shard = write_shard(tmp_path / "test.tar", [{"caption": f"picture {i}"} for i in range(20)])
    return Retrieval(shard, {"key": "txt", "pick": "one"}, recall_at=[1])


class Rude(Benchmark):
    """Draws from every random stream there is."""

    def score(self, features):
        return {"sum": random.random() + np.random.rand() + torch.rand(()).item()}


def test_names(backbone, benchmark):
    scores = evaluate(backbone, {"retrieval": benchmark})
    assert set(scores) == {f"eval/retrieval/{m}" for m in ("mean", "image_to_text_R@1", "text_to_image_R@1")}


def test_nothing_changes(backbone, benchmark):
    backbone.train()
    backbone.layer.eval()
    backbone.layer.requires_grad_(False)
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    precision = torch.get_float32_matmul_precision()

    evaluate(backbone, {"retrieval": benchmark, "rude": Rude()})

    assert states[0] == random.getstate()
    assert (states[1][1] == np.random.get_state()[1]).all()
    assert torch.equal(states[2], torch.get_rng_state())
    assert torch.is_grad_enabled()
    assert torch.get_float32_matmul_precision() == precision
    assert (backbone.training, backbone.dropout.training, backbone.layer.training) == (True, True, False)
    assert not backbone.layer.weight.requires_grad
    assert backbone.layer.weight.grad is None
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())


def test_the_mode_comes_back_after_a_failure(backbone):
    class Broken(Benchmark):
        def score(self, features):
            raise RuntimeError

    with pytest.raises(RuntimeError):
        evaluate(backbone.train(), {"broken": Broken()})
    assert backbone.training


def test_autocast_and_dropout_do_not_reach_the_features(backbone):
    plain = backbone.eval()
    with scoring(plain) as features:
        expected = features.texts(plain.words)
    with torch.autocast("cpu", torch.bfloat16), scoring(backbone.train()) as features:
        assert torch.equal(features.texts(backbone.words), expected)
    assert backbone.dtypes == {torch.float32}


def test_bf16_weights_are_scored_in_fp32_and_stay_bf16(backbone):
    with scoring(backbone.to(torch.bfloat16)) as features:
        assert features.texts(backbone.words).dtype == torch.float32
        assert features.backbone.dtypes == {torch.float32}
    assert backbone.layer.weight.dtype == torch.bfloat16


def test_equal_texts_have_equal_features_and_order_is_kept(backbone):
    texts = ["picture 3", "picture 1", "picture 3"]
    features = embed_texts(backbone.eval(), texts)
    assert torch.equal(features[0], features[2])
    assert features.norm(dim=-1).tolist() == pytest.approx([1, 1, 1])
    expected = torch.nn.functional.normalize(backbone.vectors[1], dim=0)
    torch.testing.assert_close(features[1], expected)


def test_shared_shards_are_embedded_once(backbone, benchmark):
    evaluate(backbone, {"one": benchmark, "two": benchmark})
    assert backbone.seen == 20
    evaluate(backbone, {"one": benchmark})
    assert backbone.seen == 40


def test_selection_logs_its_metric_for_the_checkpoint(backbone, benchmark):
    logged = {}
    module = SimpleNamespace(backbone=backbone, log=lambda name, value, **_: logged.update({name: value}))
    Selection(benchmark, "mean").on_validation_epoch_end(L.Trainer(logger=False, barebones=True), module)
    assert logged == {"selection/mean": benchmark(backbone)["mean"]}
    with pytest.raises(ValueError, match="image_to_text_R@1"):
        Selection(benchmark, "accuracy").on_validation_epoch_end(L.Trainer(logger=False, barebones=True), module)


@pytest.mark.parametrize("name", sorted(path.stem for path in CONF.glob("*.yaml")))
def test_every_yaml_binds_its_constructors(name):
    """And what chooses a checkpoint reads other shards than what is reported."""
    data = {
        "prepare": {"root": "scenes"},
        "selection": "selection.tar",
        "allow_pipe": False,
        "texts": {"caption": {"key": "txt", "pick": "one", "k": 1}},
    }
    cfg = OmegaConf.create({"eval": OmegaConf.load(CONF / f"{name}.yaml"), "data": data})
    if name == "standard":
        cfg.eval.shards = "test.tar"
    benchmarks = instantiate(cfg.eval.benchmarks)
    assert all(isinstance(benchmark, Benchmark) for benchmark in benchmarks.values())
    assert all("test" in benchmark.shards for benchmark in benchmarks.values())
    if cfg.eval.selection is not None:
        assert "selection" in instantiate(cfg.eval.selection).shards
