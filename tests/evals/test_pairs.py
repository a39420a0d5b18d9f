import pytest
import torch
from planted import Planted, write_shard
from torch.nn.functional import normalize

from clipfix.evals.pairs import Pairs, picks

PATTERNS = ("Orientation and Direction",) * 3 + ("Text",)


@pytest.fixture
def shard(tmp_path):
    records = [{"pair": i // 2, "pattern": PATTERNS[i // 2], "statement": f"thing {i}"} for i in range(8)]
    return write_shard(tmp_path / "pairs.tar", records)


def planted(images, texts):
    return Planted(images, {f"a photo of thing {i}": text for i, text in enumerate(texts)})


def test_planted_answers(shard):
    pairs = Pairs(shard, prefix="a photo of ")
    own = torch.eye(8)
    right = {"orientation_and_direction": 100, "text": 100}
    assert pairs(planted(own, own)) == {"mean": 100, **right, "ties": 0}
    reversed_ = own[[1, 0, 3, 2, 5, 4, 7, 6]]
    assert pairs(planted(own, reversed_)) == {"mean": 0, **dict.fromkeys(right, 0), "ties": 0}
    blind = torch.ones(8, 8)
    assert pairs(planted(blind, own)) == {"mean": 0, **dict.fromkeys(right, 0), "ties": 8}


def test_one_wrong_text_loses_its_pair_and_patterns_weigh_the_same(shard):
    texts = torch.eye(8)
    texts[0] = texts[1]
    scores = Pairs(shard, prefix="a photo of ")(planted(torch.eye(8), texts))
    assert scores["orientation_and_direction"] == pytest.approx(200 / 3)
    assert scores["text"] == 100
    assert scores["mean"] == pytest.approx((200 / 3 + 100) / 2)


def test_picks_is_a_double_loop_over_texts_and_images():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(-1, 2, (200, 2, 3), generator=generator).float()  # small integers, so that ties occur
    texts = torch.randint(-1, 2, (200, 2, 3), generator=generator).float()
    right, tied = picks(images, texts)
    for p in range(200):
        wins = []
        for t in range(2):
            own, other = float(texts[p, t] @ images[p, t]), float(texts[p, t] @ images[p, 1 - t])
            wins.append(own > other)
            assert tied[p, t] == (own == other)
        assert right[p] == all(wins)
    assert tied.any()


def test_without_ties_it_is_clip_benchmarks_image_acc():
    selection = pytest.importorskip("clip_benchmark.metrics.image_caption_selection")
    generator = torch.Generator().manual_seed(1)
    images = normalize(torch.randn(60, 2, 5, generator=generator), dim=-1)
    texts = normalize(torch.randn(60, 2, 5, generator=generator), dim=-1)
    right, tied = picks(images, texts)
    assert not tied.any()

    class Model:
        def encode_image(self, pictures):
            return images.flatten(0, 1)[pictures[:, 0, 0, 0].long()]

        def encode_text(self, tokens):
            return texts.flatten(0, 1)[tokens]

    numbers = torch.arange(120).view(60, 2)
    loader = [(numbers.view(60, 2, 1, 1, 1), numbers.tolist())]
    theirs = selection.evaluate(Model(), loader, torch.tensor, "cpu", amp=False)
    assert right.float().mean().item() == pytest.approx(theirs["image_acc"])


def test_half_a_pair_is_refused(tmp_path):
    records = [{"pair": i // 2, "pattern": "Text", "statement": f"thing {i}"} for i in range(3)]
    shard = write_shard(tmp_path / "pairs.tar", records)
    with pytest.raises(ValueError, match="not two pictures"):
        Pairs(shard, prefix="a photo of ")(planted(torch.eye(8), torch.eye(8)))
