"""Arguments of the command for runs of two steps on small drawn worlds, and its messages for wrong arguments."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
METHODS = sorted(path.stem for path in (ROOT / "conf" / "method").glob("*.yaml"))
# Two steps on CPU, everything logged; drawn worlds of a few dozen pictures.
RUN = [
    "logger=csv",
    "trainer=cpu",
    "trainer.val_check_interval=1",
    "trainer.log_every_n_steps=1",
    "method.schedule.warmup_steps=1",
    "report.pictures=false",  # they take seconds; a test that looks at them asks for them
]
DATA = ["data.batch_size=8", "data.workers=0", "data.shuffle=0"]
SIZES = {
    "train": 64,
    "selection": 48,
    "test": 48,
    "pairs_train": 1,
    "pairs_selection": 2,
    "pairs_test": 2,
    "summaries_test": 3,
    "train_junk": 0.08,  # the same world for every method, whatever its recipe sets
    "train_wrong": 0.05,
    "popular": 0,
    "processes": 1,
}
WORLD = [f"data.prepare.{name}={size}" for name, size in SIZES.items()]
QUICK = [*RUN, *DATA, *WORLD, "method.steps=2"]
DIVA = [
    "method=diva",
    "method.condition.steps=1",
    "callbacks.watch.every_n_batches=1",
]  # one step of each phase, with all notes logged
FEWER = [f"~eval.benchmarks.{name}" for name in ("pairs_local", "probes", "retrieval_long", "lengths")]  # slow to score
FEW = [*FEWER, "~eval.benchmarks.retrieval_short", "~eval.benchmarks.retrieval_long_alike"]  # two are left
UNSTAGED = [
    "condition@method.condition=visual_tokens",
    "patches@method.condition.patches=none",
    "method.condition.null_text=mean",
    "method.condition.tokens=8",
]  # without a first phase, so the tower trains from the first step
UNDRAWN = ["callbacks.reconstructions=null"]


def refusal(clipfix, *arguments: str) -> str:
    """Run the command, which must exit with a message, and return the message."""
    with pytest.raises(SystemExit) as exit_:
        clipfix(*arguments)
    assert isinstance(exit_.value.code, str)
    assert "Traceback" not in exit_.value.code
    return exit_.value.code


def python_m_clipfix(*arguments: str, **options) -> subprocess.CompletedProcess:
    """Run the command in a new process and return the result."""
    command = [sys.executable, "-m", "clipfix", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)
