import pytest
import torch
from planted import PATCHES, Planted, write_shard
from torch.nn.functional import normalize

from clipfix.evals import embed
from clipfix.evals.embed import PatchPooling, global_plus_local
from clipfix.evals.features import scoring
from clipfix.evals.pairs import Pairs, picks
from clipfix.models.clip import Backbone

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
    with pytest.raises(ValueError, match=r"^1 pairs in .*pairs\.tar"):
        Pairs(shard, prefix="a photo of ")(planted(torch.eye(8), torch.eye(8)))


# -- global + mean(local) ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalized", [False, True])
def test_global_plus_local_is_a_loop_over_tokens(normalized):
    generator = torch.Generator().manual_seed(0)
    pooled, patches = torch.randn(3, 4, generator=generator), 5 * torch.rand(3, 7, 4, generator=generator)

    def token(vector):
        vector = vector.double()
        return vector / vector.square().sum().sqrt() if normalized else vector

    for row, found in enumerate(global_plus_local(pooled, patches, normalized)):
        expected = token(pooled[row])
        for patch in patches[row]:
            expected = expected + token(patch) / 7
        torch.testing.assert_close(found.double(), expected / expected.square().sum().sqrt(), atol=1e-6, rtol=1e-5)


def local_features(shard, local, backbone=None):
    backbone = backbone or planted(torch.randn(8, 8, generator=torch.Generator().manual_seed(0)), torch.eye(8))
    with scoring(backbone) as features:
        return features.images(shard, pooling=local)[0]


@pytest.mark.parametrize(("tokens", "amount"), [(None, PATCHES), (3, 3), (76, 76), (0.4, 2), (0.01, 1)])
def test_pictures_are_embedded_by_the_drawn_patches(shard, tokens, amount):
    local = PatchPooling(tokens, normalized=False, seed=0)
    images = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    for i, row in enumerate(local_features(shard, local)):
        drawn = local.sample(f"{i:06d}", PATCHES)
        assert len(drawn) == amount
        mean = torch.stack([(n + 1) * images[i].roll(n + 1) for n in drawn]).mean(0)
        torch.testing.assert_close(row, normalize(images[i] + mean, dim=0))


def test_the_same_seed_draws_the_same_patches_whatever_the_batch(shard, monkeypatch):
    features = local_features(shard, PatchPooling(2, normalized=True, seed=0))
    for size in (1, 3, 64):
        monkeypatch.setattr(embed, "BATCH", size)
        assert torch.equal(local_features(shard, PatchPooling(2, normalized=True, seed=0)), features)
    assert not torch.equal(local_features(shard, PatchPooling(2, normalized=True, seed=1)), features)
    assert len({tuple(PatchPooling(4, False, 0).sample(str(key), 9)) for key in range(20)}) > 10


def test_both_rules_score_side_by_side_and_each_embeds_once(shard):
    """Patches of picture 0 alone say the opposite of it: the plain rule is not fooled, the other is."""
    backbone = planted(torch.eye(8), torch.eye(8))

    def visual_tokens(images):
        pooled = backbone.encode_image(images)
        return pooled, torch.where(pooled[:, :1] > 0, -2 * pooled, pooled)[:, None]

    backbone.visual_tokens = visual_tokens
    plain = Pairs(shard, prefix="a photo of ")
    local = Pairs(shard, prefix="a photo of ", local={"tokens": None, "normalized": False, "seed": 0})
    with scoring(backbone) as features:
        assert [plain.score(features).values["text"] for _ in range(2)] == [100, 100]
        for _ in range(2):
            scores = local.score(features)
            assert scores.values["orientation_and_direction"] == pytest.approx(200 / 3)
    assert backbone.seen == 16
    assert local.figure(["score"], [scores]) is None


def test_on_a_real_tower_it_is_the_sum_of_its_tokens(tmp_path, clip_folder):
    shard = write_shard(tmp_path / "pairs.tar", [{} for _ in range(3)])
    backbone = Backbone(clip_folder, pretrained="random").eval()
    found = local_features(shard, PatchPooling(None, normalized=False, seed=0), backbone)
    images = torch.stack([torch.full((3, 32, 32), i / 255) for i in range(3)])
    with torch.no_grad():
        pooled, patches = backbone.visual_tokens(images)
    torch.testing.assert_close(found, normalize(pooled + patches.mean(1), dim=-1), atol=1e-5, rtol=1e-4)


def test_a_tower_without_patches_is_refused_with_the_way_out(shard):
    backbone = planted(torch.eye(8), torch.eye(8))

    def visual_tokens(images):
        raise ValueError("backbone.name=RN50 has no patch tokens.")

    backbone.visual_tokens = visual_tokens
    with pytest.raises(ValueError, match=r"RN50.*~eval\.benchmarks\.pairs_local"):
        Pairs(shard, "a photo of ", {"tokens": None, "normalized": False, "seed": 0})(backbone)


@pytest.mark.parametrize("tokens", [0, -3, 1.5, 0.0])
def test_wrong_amounts_of_patches_are_refused(tokens):
    with pytest.raises(ValueError, match=r"local\.tokens"):
        PatchPooling(tokens, normalized=False, seed=0)
