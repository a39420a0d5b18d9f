import pytest
import torch
from planted import Planted, write_shard
from torch.nn.functional import normalize

from clipfix.evals.probes import Probes
from clipfix.evals.zeroshot import ZeroShot

COLOURS = ("red", "green", "blue")
QUESTION = {"colour": {"classes": COLOURS, "templates": ["{}", "a {} thing"]}}


def record(colour, things=1, count=1):
    return {"factors": {"colour": colour, "count": count}, "scene": {"things": [{}] * things}}


@pytest.fixture
def shard(tmp_path):
    """60 pictures whose colour is known, then one with two things and one without a colour."""
    records = [record(COLOURS[i % 3]) for i in range(60)] + [record("red", things=2), record(None)]
    return write_shard(tmp_path / "test.tar", records)


def planted(seed, answer):
    """Pictures scatter around the axis of `answer(i)`, prompts lie on the axes."""
    noise = 0.1 * torch.randn(62, 8, generator=torch.Generator().manual_seed(seed))
    images = torch.stack([torch.eye(8)[answer(i)] for i in range(62)]) + noise
    texts = {form.format(c): torch.eye(8)[k] for k, c in enumerate(COLOURS) for form in ("{}", "a {} thing")}
    return Planted(images, texts)


def test_zeroshot_of_planted_answers(shard):
    ask = ZeroShot(shard, QUESTION)
    assert ask(planted(0, lambda i: i % 3)) == {"colour": 100}
    assert ask(planted(0, lambda i: (i + 1) % 3)) == {"colour": 0}
    assert ask(planted(0, lambda i: 0)) == {"colour": pytest.approx(100 / 3)}


def test_zeroshot_leaves_groups_out(tmp_path):
    """The group's picture lies on green's axis: were it asked, one answer of three would be wrong."""
    shard = write_shard(tmp_path / "test.tar", [record("red"), record("red", count=3), record("blue")])
    backbone = planted(0, lambda i: (0, 1, 2)[i % 3])
    assert ZeroShot(shard, QUESTION)(backbone) == {"colour": 100}


def test_zeroshot_is_clip_benchmarks(shard):
    theirs = pytest.importorskip("clip_benchmark.metrics.zeroshot_classification")
    generator = torch.Generator().manual_seed(3)
    words = [form.format(c) for c in COLOURS for form in ("{}", "a {} thing")]
    backbone = Planted(
        torch.randn(62, 8, generator=generator), {word: torch.randn(8, generator=generator) for word in words}
    ).eval()
    heads = theirs.zero_shot_classifier(backbone, backbone.tokenize, COLOURS, ["{c}", "a {c} thing"], "cpu", amp=False)
    right = (normalize(backbone.images[:60], dim=-1) @ heads).argmax(dim=1) == torch.arange(60) % 3
    assert ZeroShot(shard, QUESTION)(backbone)["colour"] == pytest.approx(100 * right.float().mean().item())


def test_probes_read_what_is_there_in_any_direction_and_nothing_else(shard):
    ask = Probes(shard, shard, ["colour"], alphas=[1.0, 10.0])
    assert ask(planted(0, lambda i: (i + 1) % 3)) == {"mean": 100, "colour": 100}
    blind = ask(planted(0, lambda i: 0))
    assert blind["colour"] < 75


def test_a_probe_answers_as_it_was_fitted(shard, tmp_path):
    """On another split each colour has the picture of the next one, so what is learned there is wrong here."""
    others = write_shard(tmp_path / "fit.tar", [record(COLOURS[(i + 1) % 3]) for i in range(60)])
    backbone = planted(0, lambda i: i % 3)
    assert Probes(shard, shard, ["colour"], alphas=[1.0])(backbone)["colour"] == 100
    assert Probes(others, shard, ["colour"], alphas=[1.0])(backbone)["colour"] == 0


def test_a_probe_that_knows_one_class_scores_chance_however_frequent_it_is(tmp_path):
    colours = ["red"] * 50 + ["green"] * 5
    shard = write_shard(tmp_path / "test.tar", [record(colour) for colour in colours])
    backbone = Planted(torch.ones(62, 8), {"unused": torch.ones(8)})
    assert Probes(shard, shard, ["colour"], alphas=[1.0])(backbone)["colour"] == pytest.approx(50)
