"""Stretched positions, principal components and both losses against the authors' code, and in cases known exactly."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from clipfix.functional.components import principal_reconstruction
from clipfix.functional.contrastive import contrastive_loss
from clipfix.functional.positions import stretch

# Random inputs and what the authors' code (github.com/beichenzbc/Long-CLIP) made of them, float32 on a CPU.
REFERENCE = load_file(Path(__file__).with_name("longclip.safetensors"))


def features(rows: int, width: int = 24, seed: int = 0, rank: int | None = None) -> torch.Tensor:
    """Normalized float64 rows; `rank` puts them all in a plane of so many directions."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    if rank is not None:
        drawn = drawn[:, :rank] @ torch.randn(rank, width, generator=generator, dtype=torch.float64)
    return F.normalize(drawn, dim=-1)


# -- positions ---------------------------------------------------------------------------------------------------------


def test_stretch_equals_the_reference():
    out = stretch(REFERENCE["stretch.in"], keep=20, ratio=4)
    torch.testing.assert_close(out, REFERENCE["stretch.out"], atol=1e-5, rtol=0)
    assert torch.equal(out[:20], REFERENCE["stretch.in"][:20])


@pytest.mark.parametrize(
    ("keep", "ratio", "length"), [(20, 4, 248), (20, 8, 476), (0, 4, 308), (20, 1, 77), (75, 3, 81)]
)
def test_stretch_has_the_stated_length_and_old_rows(keep, ratio, length):
    table = torch.randn(77, 8, dtype=torch.float64)
    out = stretch(table, keep, ratio)
    assert len(out) == length
    assert torch.equal(out[:keep], table[:keep])
    torch.testing.assert_close(out[keep::ratio], table[keep:])


def test_stretch_of_a_line_is_a_line():
    table = torch.arange(10.0, dtype=torch.float64)[:, None]
    expected = torch.cat([torch.arange(4.0), torch.arange(4, 10, 0.5)]).double()[:, None]
    torch.testing.assert_close(stretch(table, keep=4, ratio=2), expected)


@pytest.mark.parametrize(
    ("keep", "ratio", "message"),
    [(77, 4, "keep is 77"), (76, 2, "keep is 76"), (78, 1, "keep is 78"), (-1, 4, "keep is -1"), (20, 0, "ratio is 0")],
)
def test_stretch_refuses_what_cannot_be(keep, ratio, message):
    with pytest.raises(ValueError, match=message):
        stretch(torch.zeros(77, 4), keep, ratio)


# -- principal components ----------------------------------------------------------------------------------------------


def by_svd(rows: torch.Tensor, components: int) -> torch.Tensor:
    """The textbook form, whose own gradient is right where no two singular values meet."""
    mean = rows.mean(0)
    _, _, directions = torch.linalg.svd(rows - mean, full_matrices=False)
    return (rows - mean) @ directions[:components].T @ directions[:components] + mean


def test_components_equal_the_reference():
    out = principal_reconstruction(REFERENCE["pca32.in"], 32)
    torch.testing.assert_close(out, REFERENCE["pca32.out"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("rows", [10, 24, 60])
def test_value_and_gradient_equal_an_svd(rows):
    weights = torch.randn(rows, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ours, textbook = (features(rows).requires_grad_() for _ in range(2))
    (principal_reconstruction(ours, 5) * weights).sum().backward()
    (by_svd(textbook, 5) * weights).sum().backward()
    torch.testing.assert_close(principal_reconstruction(ours, 5), by_svd(ours, 5))
    torch.testing.assert_close(ours.grad, textbook.grad)


@pytest.mark.parametrize("rows", [5, 9])
def test_gradient_equals_finite_differences(rows):
    assert torch.autograd.gradcheck(lambda x: principal_reconstruction(x, 3), features(rows, 7).requires_grad_())


def test_gradient_is_right_where_kept_singular_values_repeat():
    """Four rows on a square have two equal directions: an SVD's gradient is infinite there, the plane's is not."""
    square = torch.tensor(
        [[2, 0, 0, 0], [0, 2, 0, 0], [-2, 0, 0, 0], [0, -2, 0, 0], [0, 0, 1, 0], [0, 0, -1, 0]]
    ).double()
    assert torch.autograd.gradcheck(lambda x: principal_reconstruction(x, 2), square.requires_grad_())
    by_svd(square, 2).square().sum().backward()
    assert not square.grad.isfinite().all()


@pytest.mark.parametrize("components", [1, 2, 3, 5])
def test_gradient_is_finite_where_the_plane_is_a_matter_of_chance(components):
    """All directions alike, three directions in all, and rows that are all the same."""
    for rows in (torch.eye(8).double(), features(9, rank=3), torch.ones(6, 8).double()):
        rows = rows.clone().requires_grad_()
        out = principal_reconstruction(rows, components)
        (out * torch.randn_like(out)).sum().backward()
        assert out.isfinite().all()
        assert rows.grad.isfinite().all()


def test_rank_deficient_batch_comes_back_whole():
    rows = features(30, rank=4)
    torch.testing.assert_close(principal_reconstruction(rows, 4), rows)
    torch.testing.assert_close(principal_reconstruction(rows.float(), 6), rows.float())


@pytest.mark.parametrize(("rows", "components"), [(6, 5), (6, 32), (60, 24), (1, 1)])
def test_batch_without_more_directions_is_untouched(rows, components):
    batch = features(rows).requires_grad_()
    assert principal_reconstruction(batch, components) is batch


def test_autocast_does_not_round_the_components():
    rows = features(40).float()
    with torch.autocast("cpu", torch.bfloat16):
        inside = principal_reconstruction(rows, 4)
    assert torch.equal(inside, principal_reconstruction(rows, 4))


# -- both losses, as the ranks of the reference saw them ---------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2])
def test_losses_and_gradients_equal_the_reference(world):
    given = {name: REFERENCE[f"loss.world{world}.{name}"] for name in ("image", "long", "short")}
    raw = {name: rows.clone().requires_grad_() for name, rows in given.items()}
    image, long, short = (F.normalize(rows, dim=-1) for rows in raw.values())
    part = len(image) // world
    spans = [slice(rank * part, (rank + 1) * part) for rank in range(world)]
    reduced = torch.cat([principal_reconstruction(image[span], 32) for span in spans])
    scale = REFERENCE["logit_scale"].exp()
    terms = {
        "long": [contrastive_loss(image[s], long[s], image, long, scale, s.start, 0.1) for s in spans],
        "short": [contrastive_loss(reduced[s], short[s], reduced, short, scale, s.start, 0.1) for s in spans],
    }
    for name, losses in terms.items():
        expected = REFERENCE[f"loss.world{world}.loss_{name}_per_rank"]
        torch.testing.assert_close(torch.stack(losses), expected, atol=1e-5, rtol=1e-6)
    # The backward of a gathering all_gather sums over ranks, which is the gradient of the sum of all ranks' losses.
    torch.stack([*terms["long"], *terms["short"]]).sum().backward()
    for name, rows in raw.items():
        expected = REFERENCE[f"loss.world{world}.grad_{name}"]
        assert (rows.grad - expected).norm() <= 1e-4 * expected.norm(), name
