"""What the benchmarks share: a device's ceiling, and a process of its own for a peak."""

import multiprocessing
import time
from collections.abc import Callable
from typing import Any

import torch


def matrix_ceiling(device: str, dtype: torch.dtype) -> float:
    """Operations a second of one large matrix product, the best of five."""
    side = 8192 if device == "cuda" else 2048
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        (left @ right)[0, 0].item()
        seconds.append(time.perf_counter() - start)
    return 2 * side**3 / min(seconds)


def alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """In a process of its own: a peak, once reached, hides all that come after it."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)
