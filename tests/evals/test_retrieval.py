import pytest
import torch
from planted import Planted, write_shard
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from clipfix.evals import ranking
from clipfix.evals.features import scoring
from clipfix.evals.lengths import Lengths
from clipfix.evals.ranking import ranks
from clipfix.evals.retrieval import Retrieval, retrieval_ranks, strip_common_sentences


def random_features(seed, pictures=23, captions=3, dim=4):
    generator = torch.Generator().manual_seed(seed)
    images = normalize(torch.randn(pictures, dim, generator=generator), dim=-1)
    texts = normalize(torch.randn(pictures * captions, dim, generator=generator), dim=-1)
    return images, texts, torch.arange(pictures), torch.arange(pictures).repeat_interleave(captions)


def slow_rank(query, gallery, picture, gallery_picture):
    """Sort everything, look for the first match."""
    order = sorted(range(len(gallery)), key=lambda i: -float(query @ gallery[i]))
    return next(place for place, i in enumerate(order, 1) if gallery_picture[i] == picture)


def test_a_rank_is_a_place_in_the_sorted_list(monkeypatch):
    monkeypatch.setattr(ranking, "CHUNK", 7)
    images, texts, picture, owner = random_features(0)
    for query, found in ((images, texts), (texts, images)):
        wanted, labels = (picture, owner) if query is images else (owner, picture)
        expected = [slow_rank(row, found, label, labels) for row, label in zip(query, wanted, strict=True)]
        assert ranks(query, found, wanted, labels).tolist() == expected
        assert max(expected) > 10


def test_among_equals_the_stored_order_counts():
    alike = torch.ones(5, 3)
    numbers = torch.arange(5)
    assert ranks(alike, alike, numbers, numbers).tolist() == [1, 2, 3, 4, 5]
    assert ranks(alike, alike, torch.tensor([3, 9]).repeat(3)[:5], torch.tensor([0, 3, 3, 0, 0]))[0] == 2


def test_recall_is_clip_benchmarks():
    theirs = pytest.importorskip("clip_benchmark.metrics.zeroshot_retrieval").recall_at_k
    images, texts, picture, owner = random_features(1)
    scores, positives = texts @ images.T, owner[:, None] == picture
    ways = retrieval_ranks([str(i) for i in picture.tolist()], images, texts)
    for k in (1, 5, 10):
        to_image = 100 * (theirs(scores, positives, k) > 0).float().mean().item()
        to_text = 100 * (theirs(scores.T, positives.T, k) > 0).float().mean().item()
        assert ways["text_to_image"].percent(k) == pytest.approx(to_image)
        assert ways["image_to_text"].percent(k) == pytest.approx(to_text)


def test_recall_is_torchmetrics():
    theirs = pytest.importorskip("torchmetrics.functional.retrieval").retrieval_hit_rate
    images, texts, picture, owner = random_features(2)
    found = ranks(images, texts, picture, owner)
    for k in (1, 5, 10, len(texts)):
        hits = [theirs(texts @ image, owner == i, top_k=k) for i, image in enumerate(images)]
        assert (found <= k).float().mean().item() == pytest.approx(torch.stack(hits).mean().item())


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation made."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        self.elements = max([self.elements, *(leaf.numel() for leaf in tree_leaves(made) if hasattr(leaf, "numel"))])
        return made


def test_ranks_hold_the_scores_of_a_few_queries_at_a_time():
    """Whatever the size: at 31k x 155k a chunk's scores take 160 MB, all of them 19 GB."""
    images, texts, picture, owner = random_features(3, pictures=1500, captions=5, dim=8)
    with Largest() as to_text:
        ranks(images, texts, picture, owner)
    with Largest() as to_image:
        ranks(texts, images, owner, picture)
    assert to_text.elements == ranking.CHUNK * len(texts) < 1500 * len(texts) / 5
    assert to_image.elements == ranking.CHUNK * len(images)


def test_pictures_may_have_different_numbers_of_captions(tmp_path):
    """Picture 0 has three captions, of which the last is another one's; k of null asks with all of them."""
    captions = [["a", "b", "of c"], ["c"], ["d"]]
    shard = write_shard(tmp_path / "test.tar", [{"captions": several} for several in captions])
    eye = torch.eye(4)
    texts = {"a": eye[0], "b": eye[0], "of c": eye[1], "c": eye[1] + 0.1 * eye[3], "d": eye[2]}
    scores = Retrieval(shard, {"key": "captions", "pick": "all", "k": None}, recall_at=[1])(Planted(eye[:3], texts))
    assert scores["text_to_image_R@1"] == pytest.approx(80)
    assert scores["image_to_text_R@1"] == pytest.approx(200 / 3)  # picture 1 finds "of c" first
    first = Retrieval(shard, {"key": "captions", "pick": "all", "k": 2}, recall_at=[1])(Planted(eye[:3], texts))
    assert first["text_to_image_R@1"] == 100


def test_planted_ranks(tmp_path):
    """Each caption points at the next picture, its own comes second: R@1 0, R@2 100."""
    shard = write_shard(tmp_path / "test.tar", [{"caption": f"picture {i}"} for i in range(6)])
    eye = torch.eye(6)
    ask = Retrieval(shard, {"key": "txt", "pick": "one"}, recall_at=[1, 2])
    exact = ask(Planted(eye, {f"picture {i}": eye[i] for i in range(6)}))
    assert exact == dict.fromkeys(exact, 100)
    shifted = ask(Planted(eye, {f"picture {i}": 0.6 * eye[i] + 0.8 * eye[(i + 1) % 6] for i in range(6)}))
    assert (shifted["image_to_text_R@1"], shifted["text_to_image_R@1"]) == (0, 0)
    assert (shifted["image_to_text_R@2"], shifted["text_to_image_R@2"]) == (100, 100)


def test_any_of_several_captions_is_a_hit_and_each_is_a_query(tmp_path):
    records = [{"captions": [f"good {i}", f"bad {i}"]} for i in range(4)]
    shard = write_shard(tmp_path / "test.tar", records)
    eye = torch.eye(8)
    texts = {f"good {i}": eye[i] for i in range(4)} | {f"bad {i}": -eye[i] for i in range(4)}
    scores = Retrieval(shard, {"key": "captions", "pick": "all", "k": 2}, recall_at=[1])(Planted(eye, texts))
    assert scores["image_to_text_R@1"] == 100
    assert scores["text_to_image_R@1"] == 50


def test_lengths_ask_with_the_beginning_of_each_caption(tmp_path):
    """The first word says one of two halves, the second which picture of the half; a third adds nothing."""
    captions = {f"{half} {one} end": (half, one) for half in "ab" for one in "cd"}
    shard = write_shard(tmp_path / "test.tar", [{"caption": caption} for caption in captions])
    eye = torch.eye(4)
    texts = {caption: eye[i] for i, caption in enumerate(captions)}
    texts |= {caption.rsplit(" ", 1)[0]: row for caption, row in texts.items()}
    texts |= {"a": eye[0] + 0.9 * eye[1], "b": eye[2] + 0.9 * eye[3]}
    ask = Lengths(shard, {"key": "txt", "pick": "one"}, tokens=[4, 3, 77])
    # Cut to one word, the two captions of a half are the same: either way finds one of two.
    with scoring(Planted(eye, texts)) as features:
        scored = ask.score(features)
    scores = scored.values
    assert scores["4_tokens_R@1"] == scores["77_tokens_R@1"] == 100
    assert list(scores) == ["3_tokens_R@1", "4_tokens_R@1", "77_tokens_R@1"]
    assert scores["3_tokens_R@1"] == pytest.approx(50)
    (axis,) = ask.figure(["before"], [scored]).axes
    assert axis.lines[0].get_xydata().tolist() == [[3, 50], [4, 100], [77, 100]]
    with pytest.raises(ValueError, match="tokens"):
        Lengths(shard, {"key": "txt", "pick": "one"}, tokens=[2])


def test_captions_are_shown_from_where_they_part():
    shared = "A fish. It is red. "
    assert strip_common_sentences([shared + "It is small.", shared + "It swims."]) == [
        "... It is small.",
        "... It swims.",
    ]
    for texts in (["a fish", "a bird"], ["A fish. Red.", "A fish. Red."], ["A fish", "A fish. Red."]):
        assert strip_common_sentences(texts) == texts
