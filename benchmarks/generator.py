"""Continues the training of the tiny generator by `method=denoise` for some minutes on a device.

    python benchmarks/generator.py --seconds 75 --batch 256         # on a GPU
    python benchmarks/generator.py --small

Reports the error on the test split before and after, with the right text, no text and the text of another picture.
"""

import argparse
import csv
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from measure import Results, name_of

SMALL = [
    "method.steps=2", "method.schedule.warmup_steps=1", "trainer.val_check_interval=1",
    "trainer.log_every_n_steps=1", "data.workers=0", "trainer.precision=32-true",
    "data.prepare.train=64", "data.prepare.selection=8", "data.prepare.test=16", "data.prepare.pairs_train=1",
    "data.prepare.pairs_selection=1", "data.prepare.pairs_test=1", "data.prepare.summaries_test=1",
]  # fmt: skip


def continue_training(args: argparse.Namespace) -> None:
    """Run the command and print its rates and errors."""
    results = Results(f"Tiny generator, trained on, {name_of(args.device)}", args.json)
    cores = os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as folder:
        words = [
            "experiment=pretrain_tiny_diffusion", "diffusion=tiny", "method.fit_autoencoder=false", "logger=csv",
            f"trainer.accelerator={'gpu' if args.device == 'cuda' else 'cpu'}", "trainer.devices=1",
            f"data.batch_size={args.batch}", f"data.prepare.root={folder}/world", f"hydra.run.dir={folder}/run",
            f"data.prepare.processes={max(1, cores - 2)}", f"data.workers={max(1, min(12, cores - 2))}",
            "method.compiled=false", f"method.steps={args.steps}", f"method.optimizer.lr={args.lr}", "seed=1",
            "callbacks.samples=null",
            f"trainer.val_check_interval={max(1, args.steps // 4)}",
        ]  # fmt: skip
        minutes, rest = divmod(args.seconds, 60)
        words += [f"+trainer.max_time=00:00:{minutes:02d}:{rest:02d}", f"data.prepare.train={args.scenes}"]
        words += SMALL if args.small else []
        begun = time.perf_counter()
        ended = subprocess.run([sys.executable, "-m", "clipfix", *words], check=False)
        seconds = time.perf_counter() - begun
        metrics = list(Path(folder).glob("run/metrics/version_0/metrics.csv"))
        rows = list(csv.DictReader(metrics[0].open())) if metrics else []
    rates = [float(row["perf/images_per_second"]) for row in rows if row.get("perf/images_per_second")]
    if rates:
        results.add("training", images_per_second=sorted(rates)[len(rates) // 2], note=f"{seconds:.0f} s in all")
    for row in rows:
        if row.get("val/t500_right"):
            right, null, other = (float(row[f"val/t500_{name}"]) for name in ("right", "null", "shuffled"))
            gain = 100 * (1 - right / null)
            note = f"right text {right:.4f}, none {null:.4f}, another's {other:.4f}: {gain:.1f} % below none"
            results.add(f"error at t = 500 after step {row['step']}", note=note)
    if ended.returncode:
        results.add("the run failed", note=f"exit code {ended.returncode}, {seconds:.0f} s")
    results.show()
    sys.exit(ended.returncode)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=120, help="time limit of training")
    parser.add_argument("--steps", type=int, default=4000, help="optimizer steps until the learning rate is zero")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--scenes", type=int, default=32768)
    parser.add_argument("--lr", type=float, default=7e-4)
    parser.add_argument("--small", action="store_true", help="two steps on a world of a few pictures")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", help="file for the rows")
    continue_training(parser.parse_args())
