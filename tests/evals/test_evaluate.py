"""Scores must not leave a trace: neither in the model nor in the randomness of the run around them."""

import copy
import csv
import random
from collections import Counter
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from omegaconf import OmegaConf
from planted import Planted, write_shard

from clipfix.data import scenes
from clipfix.data.sets import Source
from clipfix.evals import outcomes
from clipfix.evals.base import Benchmark, Scores, evaluate, percentages
from clipfix.evals.features import scoring
from clipfix.evals.retrieval import Retrieval
from clipfix.models.clip import Backbone
from clipfix.results.selection import Selection

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
        return Scores({"sum": random.random() + np.random.rand() + torch.rand(()).item()})


def test_names(backbone, benchmark):
    scores = percentages(evaluate(backbone, {"retrieval": benchmark}))
    assert set(scores) == {f"eval/retrieval/{m}" for m in ("mean", "image_to_text_R@1", "text_to_image_R@1")}


def test_scorings_do_not_depend_on_one_another(backbone, benchmark):
    """Neither on how many there were, nor on their order: a benchmark keeps nothing of them."""
    other = Planted(backbone.images.flip(0), dict(zip(backbone.words, backbone.vectors, strict=True)))
    kept = copy.deepcopy(vars(benchmark))
    first, second, again = (evaluate(one, {"it": benchmark})["it"] for one in (backbone, other, backbone))
    assert first.values == again.values != second.values
    assert vars(benchmark).keys() == kept.keys()
    texts = [
        [text.get_text() for axis in benchmark.figure(["a", "b"], pair).axes for text in axis.texts]
        for pair in ([first, second], [second, first], [again, second])
    ]
    assert texts[0] == texts[2] != texts[1]


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


def test_texts_are_embedded_once_for_a_tower_that_stays(clip_folder, monkeypatch):
    backbone, embedded = Backbone(clip_folder, "random"), []
    encode = Backbone.encode_text
    monkeypatch.setattr(
        Backbone, "encode_text", lambda self, tokens: embedded.append(len(tokens)) or encode(self, tokens)
    )

    class Ask(Benchmark):
        def score(self, features):
            cut = features.texts(["a fish in the sea"], at_most=3)
            whole = features.texts(["a fish in the sea", "a bird", "a fish in the sea"], at_most=99)
            assert torch.equal(whole[0], whole[2])
            assert not torch.allclose(whole[0], cut[0])
            return Scores({"sum": float(whole.sum())})

    torch.nn.init.normal_(backbone.text.get_parameter("token_embedding.weight"))
    texts = {}
    first = evaluate(backbone, {"one": Ask(), "two": Ask()}, texts)
    assert embedded == [1, 2]
    backbone.visual.get_parameter("proj").data += 1
    assert evaluate(backbone, {"one": Ask(), "two": Ask()}, texts) == first
    assert embedded == [1, 2]
    backbone.text.get_parameter("ln_final.weight").data[0] += 1
    assert evaluate(backbone, {"one": Ask(), "two": Ask()}, texts) != first
    assert embedded == [1, 2, 1, 2]


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
        assert features.model.dtypes == {torch.float32}
    assert backbone.layer.weight.dtype == torch.bfloat16


def test_equal_texts_have_equal_features_and_order_is_kept(backbone):
    texts = ["picture 3", "picture 1", "picture 3"]
    with scoring(backbone) as of:
        features = of.texts(texts)
    assert torch.equal(features[0], features[2])
    assert features.norm(dim=-1).tolist() == pytest.approx([1, 1, 1])
    expected = torch.nn.functional.normalize(backbone.vectors[1], dim=0)
    torch.testing.assert_close(features[1], expected)


def test_shared_shards_are_embedded_once(backbone, benchmark):
    evaluate(backbone, {"one": benchmark, "two": benchmark})
    assert backbone.seen == 20
    evaluate(backbone, {"one": benchmark})
    assert backbone.seen == 40


class Method(L.LightningModule):
    """A run with dropout, so that every stray random draw would show in its weights."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = self.scored = backbone

    def training_step(self, batch):
        return (self.backbone.encode_text(batch[:, None]) - 1).pow(2).mean()

    def validation_step(self, batch):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def train(backbone, folder, *callbacks, logger=False):
    torch.manual_seed(0)
    trainer = L.Trainer(
        max_steps=6,
        val_check_interval=2,
        num_sanity_val_steps=0,
        accelerator="cpu",
        callbacks=list(callbacks),
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=logger,
        log_every_n_steps=1,
        default_root_dir=folder,
    )
    loader = torch.utils.data.DataLoader(torch.arange(20), batch_size=4, shuffle=True)
    trainer.fit(Method(backbone), loader, torch.utils.data.DataLoader(torch.arange(4)))
    return backbone.layer.weight.detach().clone(), trainer


def test_selection_chooses_the_checkpoint_and_leaves_training_bit_identical(backbone, benchmark, tmp_path):
    twin = copy.deepcopy(backbone)
    best = ModelCheckpoint(tmp_path, monitor="selection/retrieval/mean", mode="max")
    scored, trainer = train(backbone, tmp_path, Selection({"retrieval": benchmark}, "retrieval/mean"), best)
    alone, _ = train(twin, tmp_path)
    assert torch.equal(scored, alone)
    assert not torch.equal(scored, torch.eye(16))
    chosen = torch.load(best.best_model_path, weights_only=True)["state_dict"]["backbone.layer.weight"]
    twin.layer.weight.data = chosen
    assert benchmark(twin)["mean"] == pytest.approx(best.best_model_score.item())
    assert "selection/retrieval/mean" in trainer.callback_metrics


class Told(Benchmark):
    """Scores that the test wrote; it keeps the features that it was asked with."""

    def __init__(self, **scores):
        self.scores, self.asked = scores, []

    def score(self, features):
        self.asked.append(features)
        return Scores(self.scores)


def test_selection_draws_curves_from_before_training_on(backbone, benchmark, tmp_path):
    """The mean, or every metric where there is none, and the monitored one; shared shards embedded once a check."""
    told, twin = Told(shape=90.0, colour=80.0), Told(mean=3.0, other=4.0, text=5.0)
    benchmarks = {"retrieval": benchmark, "again": benchmark, "zeroshot": told, "pairs": twin}
    logger = CSVLogger(tmp_path)
    with scoring(backbone):
        before = benchmark(backbone)["mean"]
    backbone.seen = 0
    _, trainer = train(backbone, tmp_path, Selection(benchmarks, "pairs/text"), logger=logger)
    assert len(told.asked) == 3  # before, and after steps 2 and 4 of five an epoch
    assert all(one is other for one, other in zip(told.asked, twin.asked, strict=True))
    assert backbone.seen == 3 * 20
    names = {f"selection/{name}" for name in ("retrieval/mean", "again/mean", "zeroshot/shape", "zeroshot/colour")}
    names |= {"selection/pairs/mean", "selection/pairs/text"}
    with open(f"{logger.log_dir}/metrics.csv") as file:
        logged = [row for row in csv.DictReader(file) if row["selection/pairs/text"]]
    assert {name for name in logged[0] if name.startswith("selection/")} == names
    assert [int(row["step"]) for row in logged] == [0, 1, 3]
    assert float(logged[0]["selection/retrieval/mean"]) == pytest.approx(before)
    assert trainer.callback_metrics["selection/pairs/text"] == 5


@pytest.mark.parametrize("metric", ["pairs/accuracy", "mean"])
def test_a_metric_that_is_not_scored_names_those_that_are_before_training(metric, backbone, tmp_path):
    with pytest.raises(ValueError, match="choose from pairs/mean, pairs/text"):
        train(backbone, tmp_path, Selection({"pairs": Told(mean=1.0, text=2.0)}, metric))
    assert torch.equal(backbone.layer.weight, torch.eye(16))


@pytest.mark.parametrize("name", sorted(path.stem for path in CONF.glob("*.yaml")))
def test_every_yaml_binds_its_constructors(name):
    """And what chooses a checkpoint reads other shards than what is reported."""
    data = {
        "prepare": {"root": "scenes"},
        "selection": "selection.tar",
        "allow_pipe": False,
        "texts": {name: {"key": name, "pick": "one", "k": 1} for name in ("caption", "long")},
    }
    cfg = OmegaConf.create({"eval": OmegaConf.load(CONF / f"{name}.yaml"), "data": data})
    if OmegaConf.is_missing(cfg.eval, "shards"):
        cfg.eval.shards = "test.tar"
    benchmarks = instantiate(cfg.eval.get("benchmarks", {}))  # published.yaml composes the others
    assert all(isinstance(benchmark, Benchmark) for benchmark in benchmarks.values())
    assert all(isinstance(found.shards, Source) or "test" in found.shards for found in benchmarks.values())
    if cfg.eval.selection is not None:
        selection = instantiate(cfg.eval.selection)
        assert all("selection" in benchmark.shards for benchmark in selection.values())
        assert cfg.eval.selection_metric.split("/")[0] in selection


def test_the_drawn_world_is_scored_on_every_factor_and_pattern(tmp_path, clip_folder):
    root = scenes.World(
        tmp_path / "scenes",
        0,
        train=4,
        selection=60,
        test=60,
        pairs_train=0,
        pairs_selection=1,
        pairs_test=1,
        summaries_test=1,
        junk=0.08,
        wrong=0.05,
        train_junk=0.08,
        train_wrong=0.05,
        popular=0,
    )()
    cfg = OmegaConf.create({"eval": OmegaConf.load(CONF / "scenes.yaml"), "data": {"prepare": {"root": str(root)}}})
    benchmarks = instantiate(cfg.eval.benchmarks)
    scored = evaluate(Backbone(clip_folder, pretrained="random"), benchmarks)
    scores = percentages(scored)
    counts = Counter(name.split("/")[1] for name in scores)
    retrieval = dict.fromkeys(("retrieval_short", "retrieval_long", "retrieval_long_alike"), 7)
    assert counts == {"pairs": 11, "pairs_local": 11, "zeroshot": 2, "probes": 13, **retrieval, "lengths": 5}
    assert all(0 <= score <= 100 for score in scores.values())
    # Each percentage again, from what every item got, written and read.
    outcomes.save(tmp_path, ["score"], {name: [one.outcomes] for name, one in scored.items()})
    recorded = outcomes.load(tmp_path / outcomes.FILE)["score"]
    for name, score in scores.items():
        _, benchmark, metric = name.split("/")
        again = outcomes.percent(
            metric, [n.split("/")[2] for n in scores if f"/{benchmark}/" in n], recorded[benchmark]
        )
        assert again == (None if metric == "ties" else pytest.approx(score))
    watched = Selection(instantiate(cfg.eval.selection), cfg.eval.selection_metric)
    method = Method(Backbone(clip_folder, pretrained="random"))
    assert {name.removeprefix("selection/") for name in watched.score(method)} == {
        "pairs/mean", "zeroshot/shape", "zeroshot/colour", "retrieval_short/mean", "retrieval_long/mean",
    }  # fmt: skip
