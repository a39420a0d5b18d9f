"""Small drawn worlds, each drawn once for all worker processes."""

import fcntl
import os
import sys

import pytest

from clipfix.__main__ import main


def drawn(factory: pytest.TempPathFactory, name: str, *words: str) -> str:
    """Draw the world unless another worker did; return the argument with which a run reads it."""
    folder = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # the base folder of a worker lies in the common one
        folder = folder.parent
    root = f"data.prepare.root={folder / name}"
    with (folder / f"{name}.lock").open("w") as lock, pytest.MonkeyPatch.context() as patch:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / name).exists():
            patch.chdir(factory.mktemp(name))
            patch.setattr(sys, "argv", ["clipfix", "run=prepare", root, *words])
            patch.delenv("HYDRA_FULL_ERROR", raising=False)
            main()
    return root
