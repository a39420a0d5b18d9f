"""How exact fp32 products of matrices are on a GPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch


@contextmanager
def fp32_products(precision: Literal["highest", "high"]) -> Iterator[None]:
    """Within the block: `highest`, fp32 as it is, 24 bits; `high`, TF32 with 11 bits, several times as fast.

    On a CPU both are fp32.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
