"""Elementwise operations fused into one kernel on a GPU."""

import os
import shutil
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from inspect import unwrap
from typing import Any

import torch


def fused(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function`, compiled by torch.compile for tensors on a GPU.

    A chain of n operations then reads and writes its large tensors once instead of n times. Values are equal up to
    rounding. On a CPU, or on a machine without Triton or a C compiler, `function` itself runs.

    Args:
        function: a function whose first argument is a tensor; the device of that tensor decides.
    """

    @cache
    def compiled() -> Callable[..., Any]:  # on first use, because the compiler takes seconds to import
        return torch.compile(unwrap(function))  # without the shape checks that tests wrap around it

    def call(first: torch.Tensor, *rest: Any) -> Any:
        return (compiled() if first.is_cuda and can_compile() else function)(first, *rest)

    return call


@cache
def can_compile() -> bool:
    """Return whether Triton and the C compiler that it calls are installed."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    return bool(find_spec("triton") and compiler)
