"""Runs killed at random moments, taken up by resume=auto, and held against one that was left alone, bit for bit.

    python benchmarks/kills.py --kills 20 --methods diva longclip fff finetune denoise
    python benchmarks/kills.py --kills 20 --methods finetune --ranks 2

Each run is a process of its own on a small drawn world, or several ranks in one session, killed by SIGKILL after a time
drawn evenly from all that the whole run takes, imports included, and started again until it ends; then the next begins.
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
    """A run in a session of its own, so that all its ranks can be killed at once."""
    command = [sys.executable, "-m", "clipfix", f"method={method}", *RUN, *MORE.get(method, []), *words]
    command.append(f"data.prepare.root={folder.parent / 'scenes'}")
    folder.mkdir(exist_ok=True)
    return subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )


def finish(process: subprocess.Popen[bytes]) -> str:
    told = process.communicate()[0].decode()
    if process.returncode:
        raise RuntimeError(told)
    return told


def trained(folder: Path) -> dict[str, torch.Tensor]:
    (path,) = folder.glob("outputs/*/*/checkpoints/last.ckpt")
    saved = torch.load(path, weights_only=True)
    if saved["global_step"] != STEPS:
        raise RuntimeError(f"{path} is of step {saved['global_step']}")
    return saved["training"]


def stress(
    method: str, ranks: list[str], kills: int, folder: Path, draws: random.Random, bar: Progress
) -> tuple[int, int, int, int]:
    """Kills, runs, kills after which a checkpoint was there, and runs that ended on other weights."""
    finish(start(method, folder / "first", *ranks))  # draws the world
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
                told = process.communicate(timeout=draws.uniform(0, seconds) if killed < kills else None)[0].decode()
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                killed += 1
                resumed += bool(list(run.glob("outputs/*/*/checkpoints/last.ckpt")))
                bar.advance(task)
                continue
            if process.returncode:
                raise RuntimeError(told)
            break
        runs += 1
        found = trained(run)
        differ += found.keys() != whole.keys() or any(not torch.equal(found[key], whole[key]) for key in whole)
    return killed, runs, resumed, differ


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="of each method")
    parser.add_argument("--methods", nargs="+", default=["diva", "longclip", "fff", "finetune", "denoise"])
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    print(
        "| method | kills | of them with a checkpoint to go on from | runs | on other weights |\n|---|---|---|---|---|"
    )
    ranks = [f"trainer.devices={asked.ranks}", "trainer.strategy=ddp"] if asked.ranks > 1 else []
    with Progress() as bar:
        for method in asked.methods:
            with tempfile.TemporaryDirectory() as folder:
                draws = random.Random(f"{asked.seed} {method}")
                killed, runs, resumed, differ = stress(method, ranks, asked.kills, Path(folder), draws, bar)
            bar.console.print(f"| {method} | {killed} | {resumed} | {runs} | {differ} |")


if __name__ == "__main__":
    main()
