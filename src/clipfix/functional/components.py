"""Reconstruction of features from the principal components of a batch."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable


def principal_reconstruction(rows: Float[Tensor, "n d"], components: int) -> Float[Tensor, "n d"]:
    """Return each row reconstructed from the mean of the rows and their first principal components.

    The result keeps of each image what distinguishes it most from the others of the batch. Rows that vary in no more
    than `components` directions are returned unchanged. The components are eigenvectors of the smaller of the two Gram
    matrices, n x n or d x d, in float64: eigenvalues are squares of singular values, so float32 would leave only half
    of its digits in the gaps between them.

    Args:
        rows: features, one row for each image.
        components: number of principal components, 1 or more.

    Raises:
        ValueError: if `components` is below 1.

    Source: Long-CLIP (arXiv 2403.15378), section 3.2 "primary component matching".
    Departs: the reference differentiates an SVD, whose gradient is infinite where singular values repeat. Only the
    gaps between retained and discarded components matter, so the gradient here uses only these (`TopProjector`).
    """
    if components < 1:
        raise ValueError(f"components is {components}: set it to 1 or more.")
    if components >= min(len(rows) - 1, rows.shape[1]):  # n centred rows span n - 1 directions at most
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

    A change dG of the matrix rotates the subspace by u_i^T dG u_j / (l_i - l_j) for each retained eigenvector i and
    each discarded one j. Pairs of two retained or two discarded eigenvectors do not change it, so equal eigenvalues
    among them do no harm. If a retained and a discarded eigenvalue are equal, the subspace is not unique and has no
    derivative: such pairs contribute zero.
    """

    @staticmethod
    def forward(ctx: Any, gram: Float[Tensor, "m m"], components: int) -> Float[Tensor, "m m"]:
        values, vectors = torch.linalg.eigh(gram)
        retained, discarded = vectors[:, -components:], vectors[:, :-components]
        gaps = values[-components:, None] - values[None, :-components]
        smallest = len(gram) * torch.finfo(gram.dtype).eps * values[-1]
        ctx.save_for_backward(retained, discarded, torch.where(gaps > smallest, 1 / gaps, 0.0))
        return retained @ retained.T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Float[Tensor, "m m"]) -> tuple[Float[Tensor, "m m"], None]:
        retained, discarded, inverse_gaps = ctx.saved_tensors
        rotation = retained @ (retained.T @ (gradient + gradient.T) @ discarded * inverse_gaps) @ discarded.T
        return (rotation + rotation.T) / 2, None
