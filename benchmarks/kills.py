"""Kills runs at random moments, resumes them by resume=auto, and compares the weights with an uninterrupted run.

    python benchmarks/kills.py --kills 20 --methods diva longclip fff finetune denoise
    python benchmarks/kills.py --kills 20 --methods finetune --ranks 2

Each run is a process, or several ranks in one session, on a small drawn world. It is killed by SIGKILL after a time
that is uniform over the duration of an uninterrupted run, imports included, and restarted until it ends. The weights
must be bit-identical.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from rich.progress import Progress

STEPS = 60
WORLD = {"train": 128, "selection": 32, "test": 16, "pairs_train": 1, "pairs_selection": 1, "pairs_test": 1}
RUN = [
    "logger=csv", "trainer=cpu", "eval=none", "trainer.val_check_interval=5", "data.batch_size=8", "data.workers=1",
    "data.shuffle=32", f"method.steps={STEPS}", "method.schedule.warmup_steps=2",
    *(f"data.prepare.{name}={size}" for name, size in WORLD.items()),
]  # fmt: skip
MORE = {"diva": ["method.condition.steps=30", "callbacks.reconstructions=null"]}


def start(method: str, folder: Path, *words: str) -> subprocess.Popen[bytes]:
    """Start a run in a new session, so that all its ranks can be killed at once."""
    command = [sys.executable, "-m", "clipfix", f"method={method}", *RUN, *MORE.get(method, []), *words]
    command.append(f"data.prepare.root={folder.parent / 'scenes'}")
    folder.mkdir(exist_ok=True)
    return subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )


def finish(process: subprocess.Popen[bytes]) -> str:
    """Wait for a run and return its output; raise RuntimeError if it failed."""
    output = process.communicate()[0].decode()
    if process.returncode:
        raise RuntimeError(output)
    return output


def trained(folder: Path) -> dict[str, torch.Tensor]:
    """Return the trained weights of a complete run."""
    (path,) = folder.glob("outputs/*/*/checkpoints/last.ckpt")
    saved = torch.load(path, weights_only=True)
    if saved["global_step"] != STEPS:
        raise RuntimeError(f"{path} is of step {saved['global_step']}")
    return saved["training"]


def stress(
    method: str, ranks: list[str], kills: int, folder: Path, draws: random.Random, bar: Progress
) -> tuple[int, int, int, int]:
    """Return the number of kills, runs, kills with a checkpoint to resume from, and runs with other weights."""
    finish(start(method, folder / "first", *ranks))  # also draws the world
    started = time.perf_counter()
    finish(start(method, folder / "whole", *ranks))
    seconds = time.perf_counter() - started
    whole = trained(folder / "whole")
    task = bar.add_task(method, total=kills)
    killed = runs = resumed = differ = 0
    while killed < kills:
        run = folder / f"run{runs}"
        while True:
            process = start(method, run, *ranks, "resume=auto")
            try:
                output = process.communicate(timeout=draws.uniform(0, seconds) if killed < kills else None)[0].decode()
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                killed += 1
                resumed += bool(list(run.glob("outputs/*/*/checkpoints/last.ckpt")))
                bar.advance(task)
                continue
            if process.returncode:
                raise RuntimeError(output)
            break
        runs += 1
        weights = trained(run)
        differ += weights.keys() != whole.keys() or any(not torch.equal(weights[key], whole[key]) for key in whole)
    return killed, runs, resumed, differ


def main() -> None:
    """Print a table with a row for each method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="kills of each method")
    parser.add_argument("--methods", nargs="+", default=["diva", "longclip", "fff", "finetune", "denoise"])
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print("| method | kills | with a checkpoint to resume from | runs | with other weights |\n|---|---|---|---|---|")
    ranks = [f"trainer.devices={args.ranks}", "trainer.strategy=ddp"] if args.ranks > 1 else []
    with Progress() as bar:
        for method in args.methods:
            with tempfile.TemporaryDirectory() as folder:
                draws = random.Random(f"{args.seed} {method}")
                killed, runs, resumed, differ = stress(method, ranks, args.kills, Path(folder), draws, bar)
            bar.console.print(f"| {method} | {killed} | {resumed} | {runs} | {differ} |")


if __name__ == "__main__":
    main()
