"""Compares losses and weights of two hosts with two ranks each and one host with four. Needs root and Linux's ip.

    python benchmarks/hosts.py            # torchrun on both hosts
    python benchmarks/hosts.py --kill     # the same, and a rank of the second host is killed

The hosts are network namespaces connected by a virtual cable (veth). Each has its own address and loopback, and gloo
has to reach the other one. They share the disk, which hosts of a cluster need to resume.
"""

import argparse
import csv
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

STEPS = 12
WORLD = {"train": 128, "selection": 32, "test": 16, "pairs_train": 1, "pairs_selection": 1, "pairs_test": 1}
RUN = [
    "method=finetune", "trainer=ddp", "trainer.accelerator=cpu", "trainer.precision=32-true", "logger=csv", "eval=none",
    "trainer.log_every_n_steps=1", "trainer.val_check_interval=4", f"method.steps={STEPS}",
    "method.schedule.warmup_steps=2", "data.batch_size=4", "data.workers=1", "data.shuffle=32", "resume=auto",
    *(f"data.prepare.{name}={size}" for name, size in WORLD.items()),
]  # fmt: skip
HOSTS = {"clipfix-a": "10.77.0.1", "clipfix-b": "10.77.0.2"}
PORT = 29511


@contextmanager
def hosts() -> Iterator[None]:
    """Create two namespaces and the cable between them, and delete them after the block."""

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True)

    one, other = HOSTS
    try:
        for name in HOSTS:
            ip("netns", "add", name)
        ip("link", "add", "cable", "netns", one, "type", "veth", "peer", "name", "cable", "netns", other)
        for name, address in HOSTS.items():
            ip("-n", name, "addr", "add", f"{address}/24", "dev", "cable")
            ip("-n", name, "link", "set", "cable", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield
    finally:
        for name in HOSTS:
            subprocess.run(["ip", "netns", "del", name], check=False)


def torchrun(folder: Path, nodes: int, ranks: int, *before: str, **options: str) -> subprocess.Popen[bytes]:
    """Start `ranks` processes of a run on one host, in an empty folder that the hosts share.

    Args:
        before: command that enters the namespace of the host.
    """
    folder.mkdir(exist_ok=True)
    there = {"rdzv-endpoint": f"127.0.0.1:{PORT}"} | options
    words = [f"--{key}={value}" for key, value in {"nnodes": nodes, "nproc-per-node": ranks, **there}.items()]
    command = [
        *before,
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--rdzv-backend=c10d",
        "--max-restarts=1",
        *words,
    ]
    command += [*words, "-m", "clipfix", *RUN, f"data.prepare.root={folder.parent / 'scenes'}"]
    # Otherwise restarted ranks look for the others at the earlier address: torch counts restarts for each host.
    alone = {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    environment = os.environ | alone | ({"GLOO_SOCKET_IFNAME": "cable"} if before else {})
    return subprocess.Popen(command, cwd=folder, env=environment)


def kill_a_rank(folder: Path) -> None:
    """Kill the last rank as soon as there is a checkpoint to resume from."""
    while not list(folder.glob("outputs/*/*/checkpoints/last.ckpt")):
        time.sleep(0.2)
    for process in Path("/proc").glob("[0-9]*"):
        try:
            mine = (
                b"RANK=3" in (process / "environ").read_bytes().split(b"\0") and (process / "cwd").resolve() == folder
            )
        except OSError:  # the process has ended
            continue
        if mine and b"clipfix" in (process / "cmdline").read_bytes():
            print(f"SIGKILL to rank 3, process {process.name}")
            os.kill(int(process.name), 9)
            return


def learned(folder: Path) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Return the loss of each step, and the weights after the last step."""
    (run,) = folder.glob("outputs/*/*")  # one folder, although the clocks of ranks may differ
    with (run / "metrics.csv").open() as file:
        losses = {int(row["step"]): float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]}
    saved = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == len(losses) == STEPS, (saved["global_step"], losses)
    return [losses[step] for step in sorted(losses)], saved["training"]


def main() -> None:
    """Run both and print the largest differences."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kill", action="store_true")
    args = parser.parse_args()
    if os.geteuid() or shutil.which("ip") is None:
        sys.exit("benchmarks/hosts.py creates network namespaces: run it as root, with iproute2 installed.")
    with tempfile.TemporaryDirectory() as name:
        here, there = Path(name, "one"), Path(name, "two")
        torchrun(here, 1, 4).wait()
        with hosts():
            started = [
                torchrun(
                    there, 2, 2, "ip", "netns", "exec", host,
                    **{"rdzv-endpoint": f"{HOSTS['clipfix-a']}:{PORT}", "local-addr": address},
                    **{"rdzv-conf": f"is_host={int(host == 'clipfix-a')}"},  # one rendezvous for both
                )
                for host, address in HOSTS.items()
            ]  # fmt: skip
            if args.kill:
                kill_a_rank(there)
            for process in started:
                process.wait()
        (losses, weights), (expected, expected_weights) = learned(there), learned(here)
    apart = max(abs(a - b) for a, b in zip(losses, expected, strict=True))
    differ = max(
        float((weights[key].double() - weight.double()).abs().max()) for key, weight in expected_weights.items()
    )
    print(f"Losses of {STEPS} steps differ by {apart:.1e} at most, weights by {differ:.1e}.")


if __name__ == "__main__":
    main()
