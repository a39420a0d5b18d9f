"""Rank of the correct answer among all candidates."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

CHUNK = 256  # queries per matmul; the complete score matrix of 31k x 155k would take 19 GB


def ranks(
    queries: Float[Tensor, "q d"],
    candidates: Float[Tensor, "c d"],
    wanted: Int[Tensor, " q"],
    labels: Int[Tensor, " c"],
) -> Int[Tensor, " q"]:
    """Return [q] ranks, from 1, of the most similar candidate that has the wanted label of each query.

    Candidates with equal scores rank in stored order, so a model that scores n candidates equally is correct in 1 of n.

    Args:
        queries: [q, d] features.
        candidates: [c, d] features.
        wanted: [q] the label of the correct candidates of each query; at least one candidate has it.
        labels: [c] the label of each candidate.
    """
    places = torch.arange(len(candidates), device=queries.device)
    # Results are written in place. When a small tensor was kept from each chunk, the process grew by 8 GB at 155k x 31k
    # on a CPU, as if the memory of the large tensors was not reused.
    result = torch.empty(len(queries), dtype=torch.int64, device=queries.device)
    for query, label, part in zip(queries.split(CHUNK), wanted.split(CHUNK), result.split(CHUNK), strict=True):
        scores = query @ candidates.T
        right = labels == label[:, None]
        best = scores.masked_fill(~right, -torch.inf).amax(dim=1, keepdim=True)
        first = (right & (scores == best)).int().argmax(dim=1, keepdim=True)
        ahead = (scores > best) | ((scores == best) & (places < first))
        torch.add(ahead.sum(dim=1), 1, out=part)
    return result
