"""Precision of fp32 matrix products on a GPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch


@contextmanager
def fp32_products(precision: Literal["highest", "high"]) -> Iterator[None]:
    """Set the precision of fp32 matrix products within the block.

    Args:
        precision: `highest` for fp32 with 24 bits, or `high` for TF32 with 11 bits, which is several times as fast.
            On a CPU both are fp32.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
