"""Mined positives and the sigmoid loss against double loops, open_clip's SigLIP loss, and joined batches."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from open_clip.loss import SigLipLoss

from clipfix.functional.positives import ReferenceFeatures, Thresholds, mine, thresholds_for
from clipfix.functional.sigmoid import sigmoid_loss

LOOSE = Thresholds(image_text=0.5, supported=0.1, image_image=0.4, text_text=0.3)


def unit(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, 6, generator=torch.Generator().manual_seed(seed), dtype=dtype), dim=-1)


def frozen(samples: int, captions: int, seed: int) -> ReferenceFeatures:
    text = unit(samples, captions, seed=seed + 1)
    return ReferenceFeatures(unit(samples, seed=seed), text, text.mean(dim=1))


def loop(reference: ReferenceFeatures, thresholds: Thresholds) -> torch.Tensor:
    """The rule of the paper, a pair at a time."""
    n, k = reference.text.shape[:2]
    found = torch.zeros(n, n, k, dtype=torch.bool)
    for i in range(n):
        for j in range(n):
            images = float(reference.image[i] @ reference.image[j])
            texts = sum(float(a @ b) for a in reference.text[i] for b in reference.text[j]) / k**2
            for c in range(k):
                pair = float(reference.image[i] @ reference.text[j, c])
                supported = images > thresholds.image_image or texts > thresholds.text_text
                found[i, j, c] = i == j or pair > thresholds.image_text or (pair > thresholds.supported and supported)
    return found


def test_positives_are_a_double_loop():
    reference = frozen(24, 3, seed=0)
    expected = loop(reference, LOOSE)
    assert 0.05 < expected.float().mean() < 0.5
    assert torch.equal(mine(reference, reference, LOOSE, first_row=0).any(), expected)
    parts = [mine(reference.rows(slice(i, i + 8)), reference, LOOSE, first_row=i).any() for i in (0, 8, 16)]
    assert torch.equal(torch.cat(parts), expected)
    tiles = [mine(reference, reference.rows(slice(j, j + 7)), LOOSE, first_row=-j).any() for j in range(0, 24, 7)]
    assert torch.equal(torch.cat(tiles, dim=1), expected)


def test_each_condition_promotes_what_it_names():
    """One direction for images, captions at chosen angles: what is above which bar is known."""
    image = torch.eye(3)[[0, 0, 1]]  # the first two images are the same
    towards = lambda cosine: torch.tensor([cosine, 0.0, math.sqrt(1 - cosine**2)])  # noqa: E731
    text = torch.stack([towards(0.9), towards(0.3), torch.eye(3)[1]])[:, None]
    found = mine(
        ReferenceFeatures(image, text, text[:, 0]),
        ReferenceFeatures(image, text, text[:, 0]),
        Thresholds(0.5, 0.2, 0.9, 0.9),
        0,
    )
    assert found.image_text[..., 0].nonzero().tolist() == [[1, 0]]
    assert found.image_image[..., 0].nonzero().tolist() == [[0, 1], [1, 0]]
    assert not found.text_text.any()
    alike = ReferenceFeatures(
        image, text, torch.eye(3)[[0, 0, 0]]
    )  # all captions say the same; 0.3 of the image is enough then
    assert mine(alike, alike, Thresholds(0.95, 0.2, 1.1, 0.9), 0).text_text[..., 0].nonzero().tolist() == [
        [0, 1],
        [1, 0],
    ]


@pytest.mark.parametrize("seen", [600, 200])
def test_counts_become_cosines_that_promote_as_many(seen):
    """Each condition alone, in a batch of 600 of which fewer may be measured: a third sees a ninth of the pairs."""
    reference = frozen(600, 2, seed=3)
    counts = Thresholds(image_text=4.0, supported=50.0, image_image=8.0, text_text=2.0)
    bars = thresholds_for(reference.rows(slice(seen)), counts, among=600)
    pairs = torch.einsum("id,jkd->ijk", reference.image, reference.text)
    images, texts = (side @ side.T for side in (reference.image, reference.mean_text))
    others = ~torch.eye(600, dtype=torch.bool)
    for cosines, bar, asked in (
        (pairs, bars.image_text, 4.0 * 2),
        (pairs, bars.supported, 50.0 * 2),
        (images, bars.image_image, 8.0),
        (texts, bars.text_text, 2.0),
    ):
        found = (cosines > bar)[others].sum().item() / 600
        assert found == pytest.approx(asked, rel=0.002 if seen == 600 else 0.2)


def diagonal(image: torch.Tensor, text: torch.Tensor):
    return lambda part: torch.eye(len(image), len(text), dtype=torch.bool)[:, part, None].expand(-1, -1, text.shape[1])


@pytest.mark.parametrize("tile", [1, 4, 100])
def test_one_positive_each_is_siglip(tile):
    image, text = unit(9, seed=3).requires_grad_(), unit(9, seed=4).requires_grad_()
    scale, bias = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (9.0, -7.0))
    ours = sigmoid_loss(image, text[:, None], scale, bias, diagonal(image, text[:, None]), tile) / 9
    theirs = SigLipLoss()(image, text, scale, bias)
    torch.testing.assert_close(ours, theirs)
    inputs = (image, text, scale, bias)
    for own, other in zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(theirs, inputs), strict=True):
        torch.testing.assert_close(own, other)


def test_many_positives_are_a_double_loop_and_ranks_sum_to_the_joined_batch():
    reference, image, text = frozen(8, 3, seed=5), unit(8, seed=7).requires_grad_(), unit(8, 3, seed=8).requires_grad_()
    scale, bias = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (6.0, -4.0))
    mask = loop(reference, LOOSE)
    expected = sum(
        math.log1p(math.exp(-(1 if mask[i, j, c] else -1) * (6.0 * (image[i] @ text[j, c]).item() - 4.0)))
        for i in range(8) for j in range(8) for c in range(3)
    )  # fmt: skip

    def mined(first: int, rows: int, part: slice) -> torch.Tensor:
        queries = reference.rows(slice(first, first + rows))
        return mine(queries, reference.rows(part), LOOSE, first_row=first - part.start).any()

    joined = sigmoid_loss(image, text, scale, bias, partial(mined, 0, 8), tile=3)
    assert float(joined) == pytest.approx(expected, rel=1e-12)
    ranks = [sigmoid_loss(image[i : i + 2], text, scale, bias, partial(mined, i, 2), tile=3) for i in (0, 2, 4, 6)]
    inputs = (image, text, scale, bias)
    for one, all_ in zip(torch.autograd.grad(sum(ranks), inputs), torch.autograd.grad(joined, inputs), strict=True):
        torch.testing.assert_close(one, all_)


def test_gradients_are_finite_differences():
    image, text = unit(4, seed=9).requires_grad_(), unit(4, 2, seed=10).requires_grad_()
    scale, bias = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (5.0, -3.0))
    loss = lambda *inputs: sigmoid_loss(*inputs, diagonal(image, text), 3)  # noqa: E731
    assert torch.autograd.gradcheck(loss, (image, text, scale, bias))


def test_bf16_autocast_does_not_round_the_logits():
    image, text = (unit(32, seed=seed, dtype=torch.float32) for seed in (11, 12))
    arguments = (image, text[:, None], torch.tensor(100.0), torch.tensor(-10.0), diagonal(image, text[:, None]), 8)
    plain = sigmoid_loss(*arguments)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(sigmoid_loss(*arguments), plain)
