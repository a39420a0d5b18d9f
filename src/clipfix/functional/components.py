"""Features rebuilt from the few directions in which a batch varies most."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable


def principal_reconstruction(rows: Float[Tensor, "n d"], components: int) -> Float[Tensor, "n d"]:
    """Each row moved onto the plane through the batch's mean along its `components` main directions.

    Whatever these cannot hold is gone: what is left of an image is what tells it from the others of the batch. A batch
    with no more directions than that comes back as it is. The directions come from the smaller of the two Gram
    matrices, n x n or d x d, in float64: their gaps are differences of squares, which float32 halves in digits.

    Source: Long-CLIP (arXiv 2403.15378), section 3.2 "primary component matching".
    Departs: the reference differentiates an SVD, whose gradient is infinite where singular values repeat; only the
    gaps between kept and dropped directions matter, so only these are used (`TopProjector`).
    """
    if components < 1:
        raise ValueError(f"method.components is {components}: keep 1 or more, or null for features as they are.")
    if components >= min(len(rows) - 1, rows.shape[1]):  # the mean takes one direction of n
        return rows
    with torch.autocast(rows.device.type, enabled=False):
        exact = rows.double()
        mean = exact.mean(0)
        centred = exact - mean
        if len(rows) <= rows.shape[1]:
            rebuilt = TopProjector.apply(centred @ centred.T, components) @ centred
        else:
            rebuilt = centred @ TopProjector.apply(centred.T @ centred, components)
        return (rebuilt + mean).to(rows.dtype)


class TopProjector(torch.autograd.Function):
    """The projector onto the leading eigenvectors of a symmetric matrix, with a gradient that stays finite.

    The plane turns by u_i^T dG u_j / (l_i - l_j) between kept i and dropped j; pairs on the same side turn nothing, so
    equal eigenvalues there are harmless. Where a kept and a dropped value are equal, the plane is a matter of chance
    and has no derivative: such pairs get none.
    """

    @staticmethod
    def forward(ctx: Any, gram: Float[Tensor, "m m"], components: int) -> Float[Tensor, "m m"]:
        values, vectors = torch.linalg.eigh(gram)
        kept, dropped = vectors[:, -components:], vectors[:, :-components]
        gaps = values[-components:, None] - values[None, :-components]
        smallest = len(gram) * torch.finfo(gram.dtype).eps * values[-1]
        ctx.save_for_backward(kept, dropped, torch.where(gaps > smallest, 1 / gaps, 0.0))
        return kept @ kept.T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Float[Tensor, "m m"]) -> tuple[Float[Tensor, "m m"], None]:
        kept, dropped, inverse_gaps = ctx.saved_tensors
        turn = kept @ (kept.T @ (gradient + gradient.T) @ dropped * inverse_gaps) @ dropped.T
        return (turn + turn.T) / 2, None
