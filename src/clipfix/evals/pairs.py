"""Look-alike pairs: two pictures that differ in one thing, and a statement for each."""

from collections import defaultdict
from collections.abc import Sequence
from statistics import fmean

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from clipfix.evals import Benchmark
from clipfix.evals.embed import Features


def picks(
    images: Float[Tensor, "p 2 d"], texts: Float[Tensor, "p 2 d"]
) -> tuple[Bool[Tensor, " p"], Bool[Tensor, "p 2"]]:
    """Pairs whose two texts each pick their own image, and the texts that cannot tell the two images apart.

    A tie is not a pick: broken by the order of the images, it would hand out points for nothing.
    Source: Tong et al. 2024 (arXiv 2401.06209), MMVP-VLM.
    Departs: MMVP's script compares half-precision softmax values with 0.5; exact fp32 similarities differ only in ties.
    """
    # A product and a sum instead of a matmul: bit-equal images then have bit-equal scores on every device.
    scores = (texts[:, :, None] * images[:, None, :]).sum(-1)  # pair, text, image
    own, other = scores.diagonal(dim1=1, dim2=2), scores.flip(2).diagonal(dim1=1, dim2=2)
    return (own > other).all(dim=1), own == other


class Pairs(Benchmark):
    """MMVP-VLM's rule on shards whose records carry `pair`, `pattern` and `statement`.

    `mean` is over patterns, so that no pattern counts more for having more pairs; `ties` counts texts, chance is 25.
    """

    def __init__(self, shards: str | Sequence[str], prefix: str) -> None:
        self.shards, self.prefix = shards, prefix

    def score(self, features: Features) -> dict[str, float]:
        images, samples = features.images(self.shards)
        pairs: dict[int, list[int]] = defaultdict(list)
        for i, sample in enumerate(samples):
            pairs[sample["json"]["pair"]].append(i)
        halves = sum(len(pair) != 2 for pair in pairs.values())
        if halves:
            raise ValueError(f"{halves} look-alikes in {self.shards} are not two pictures: write these shards again.")
        order = torch.tensor(list(pairs.values()), device=images.device)
        texts = features.texts([self.prefix + sample["json"]["statement"] for sample in samples])
        right, tied = picks(images[order], texts[order])
        by_pattern: dict[str, list[bool]] = defaultdict(list)
        for first, answer in zip(order[:, 0].tolist(), right.tolist(), strict=True):
            pattern = samples[first]["json"]["pattern"].lower().replace(" ", "_")
            by_pattern[pattern].append(answer)
        scores = {pattern: 100 * fmean(answers) for pattern, answers in by_pattern.items()}
        return {"mean": fmean(scores.values()), **scores, "ties": float(tied.sum())}
