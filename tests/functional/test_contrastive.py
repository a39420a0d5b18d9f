"""The contrastive loss against a double loop, open_clip's own loss, and values known in closed form."""

import math

import pytest
import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss

from clipfix.functional.contrastive import contrastive_loss


def features(rows: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn(2, rows, 8, generator=generator, dtype=torch.float64)
    return F.normalize(draw[0], dim=-1), F.normalize(draw[1], dim=-1)


def loop(image: torch.Tensor, text: torch.Tensor, scale: float, smoothing: float) -> float:
    """Each image asks all texts and each text all images; row by row, term by term."""
    n, total = len(image), 0.0
    for queries, answers in ((image, text), (text, image)):
        for i in range(n):
            logits = [scale * float(queries[i] @ answers[j]) for j in range(n)]
            log_sum = math.log(sum(math.exp(x) for x in logits))
            for j in range(n):
                weight = smoothing / n + (1 - smoothing) * (i == j)
                total += weight * (log_sum - logits[j]) / (2 * n)
    return total


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_equals_a_double_loop(smoothing):
    image, text = features(7, seed=1)
    loss = contrastive_loss(image, text, image, text, torch.tensor(5.0).double(), 0, smoothing)
    assert float(loss) == pytest.approx(loop(image, text, 5.0, smoothing), abs=1e-12)


def test_equals_open_clip():
    image, text = features(7, seed=2)
    scale = torch.tensor(14.3).double()
    torch.testing.assert_close(contrastive_loss(image, text, image, text, scale, 0), ClipLoss()(image, text, scale))


def test_ranks_average_to_the_joined_batch():
    image, text = features(6, seed=3)
    scale = torch.tensor(9.0).double()
    parts = [contrastive_loss(image[i : i + 2], text[i : i + 2], image, text, scale, i) for i in (0, 2, 4)]
    torch.testing.assert_close(sum(parts) / 3, contrastive_loss(image, text, image, text, scale, 0))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("rows", [1, 3, 6])
def test_some_rows_at_a_time_equal_all_at_once(rows, smoothing):
    """Loss and every gradient, on a rank that holds rows 2 to 8 of ten."""
    found = []
    for largest in (10**6, rows * 10):
        image, text = (part.requires_grad_() for part in features(10, seed=5))
        scale = torch.tensor(12.0).double().requires_grad_()
        loss = contrastive_loss(image[2:9], text[2:9], image, text, scale, 2, smoothing, largest)
        (3 * loss).backward()
        found.append((loss.detach(), image.grad, text.grad, scale.grad))
    for ours, expected in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)


def test_blind_model_scores_log_n():
    """All features alike: every answer has probability 1/n, so the loss is ln n at any scale."""
    same = F.normalize(torch.ones(5, 8), dim=-1)
    assert float(contrastive_loss(same, same, same, same, torch.tensor(30.0), 0)) == pytest.approx(math.log(5))


def test_autocast_does_not_round_the_logits():
    image, text = (rows.float() for rows in features(64, seed=4))
    arguments = (image, text, image, text, torch.tensor(100.0), 0)
    with torch.autocast("cpu", torch.bfloat16):
        inside = contrastive_loss(*arguments)
    assert inside.item() == contrastive_loss(*arguments).item()
