"""All measurements on a GPU in one command, in at most eight minutes.

    python benchmarks/gpu.py                        # one GPU, bf16; results in outputs/gpu
    python benchmarks/gpu.py --small                # tiny shapes on a CPU in three minutes: checks that everything runs
    python benchmarks/gpu.py --parts diva losses    # selected parts

Each part is a separate command with its own time limit, the most important first. If a part fails or is stopped, its
rows so far and those of the other parts are kept. `results.json` is written after each part, and the table is printed
last. No network and no model hub are needed. Without an installation: `PYTHONPATH=src python benchmarks/gpu.py`;
`wheels.py` downloads missing packages.
"""

import argparse
import contextlib
import json
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent
PUBLISHED = (  # images per second, for comparison with ours
    ("published: CLIP ViT-g/14, A100", 70), ("published: CLIP ViT-g/14, H100", 117),
    ("published: CLIP ViT-B/32, A100", 785), ("published: CLIP ViT-B/16, A100", 337),
    ("published: Stable Diffusion 2 U-Net, 512 px, stored latents, A100", 36),
)  # fmt: skip


class Part(NamedTuple):
    """A command, the same command with tiny shapes, and the time limit in seconds."""

    command: str
    small: str
    seconds: int


PARTS = {
    "tests": Part(
        "-m pytest -m gpu -q -p no:cacheprovider --durations=10 tests/gpu", "-m pytest -m gpu -q tests/gpu", 80
    ),
    "longclip": Part(
        "benchmarks/longclip.py step chunks --model ViT-L-14 --batch 256 --components 32 --bf16 --compile --repeats 5 "
        "--chunk 256 --batches 2048",
        "benchmarks/longclip.py step chunks --model tiny --batch 8 --components 2 --repeats 1 --chunk 4 --batches 8",
        75,
    ),
    "diva": Part(
        "benchmarks/diva.py step batches --model ViT-L-14 --generator sd21-base --batch 32 --batches 64 "
        "--autocast --bf16 --compile --repeats 3",
        "benchmarks/diva.py step batches --batch 2 --batches 2 --repeats 1",
        240,
    ),
    "fff": Part(
        "benchmarks/fff.py device --samples 32768 --tiles 256 1024 --repeats 3",
        "benchmarks/fff.py device --samples 128 --repeats 1",
        30,
    ),
    "contrastive": Part("benchmarks/contrastive.py", "benchmarks/contrastive.py --samples 128 --repeats 1", 20),
    "data": Part(
        "benchmarks/data.py device --count 3584 --workers 4 14",
        "benchmarks/data.py device --count 64 --size 32 --workers 0 1",
        45,
    ),
    "generator": Part(
        "benchmarks/generator.py --seconds 45 --batch 512 --scenes 8192 --steps 1000",
        "benchmarks/generator.py --small",
        85,
    ),
}


def run(name: str, part: Part, folder: Path, small: bool, more: list[str]) -> dict[str, Any]:
    """Run one part with its output in `<name>.log`; return its rows, how it ended, and its seconds."""
    command = (part.small if small else part.command).split()
    rows = folder / f"{name}.json"
    rows.unlink(missing_ok=True)
    if name != "tests":
        command += ["--json", str(rows)]
    if name in ("longclip", "diva"):
        command += more
    begun, ended = time.perf_counter(), "done"
    paths = os.pathsep.join([str(HERE.parent / "src"), os.environ.get("PYTHONPATH", "")])
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    environment |= {"PYTHONPATH": paths, "PYTHONUNBUFFERED": "1", "WANDB_MODE": "offline"}
    with (folder / f"{name}.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, *command], stdout=log, stderr=subprocess.STDOUT, cwd=HERE.parent, env=environment,
            start_new_session=True,
        )  # fmt: skip
        try:
            if process.wait(part.seconds * (4 if small else 1)):
                ended = f"failed with {process.returncode}"
        except subprocess.TimeoutExpired:
            ended = f"stopped after {part.seconds} s"
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    seconds = time.perf_counter() - begun
    table = json.loads(rows.read_text()) if rows.exists() else {"title": name, "rows": []}
    lines = (folder / f"{name}.log").read_text().splitlines()
    tail = [line for line in lines if line.strip()][-1:] if name == "tests" else []
    if tail:
        table["rows"] = [{"name": "pytest -m gpu", "note": tail[0]}]
    print(f"{name}: {ended}, {seconds:.0f} s", flush=True)
    if ended != "done":
        print("\n".join(lines[-25:]), flush=True)
    return {**table, "command": " ".join(["python", *command]), "ended": ended, "seconds": round(seconds, 1)}


def facts() -> dict[str, str]:
    """Return device, versions and commit. Read in a separate process, so that no GPU memory stays allocated."""
    code = (
        "import torch; gpu = torch.cuda.is_available();"
        "print(torch.cuda.get_device_name() if gpu else 'CPU', torch.__version__, torch.version.cuda, sep='|')"
    )
    device, torch, cuda = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip().split("|")  # fmt: skip
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False, cwd=HERE)
    commit = git.stdout.strip() or os.environ.get("CLIPFIX_COMMIT", "unknown")
    return {"device": device, "torch": torch, "cuda": cuda, "python": platform.python_version(), "commit": commit}


def main(args: argparse.Namespace) -> None:
    """Run the parts, write results.json, and print the tables."""
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {**facts(), "small": args.small, "parts": {}}
    begun = time.perf_counter()
    for name in args.parts:
        results["parts"][name] = run(name, PARTS[name], folder, args.small, ["--profile"] if args.profile else [])
        results["seconds"] = round(time.perf_counter() - begun, 1)
        (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    sys.path.insert(0, str(HERE.parent / "src"))
    from measure import table
    from rich.console import Console

    console = Console(width=150)
    for part in results["parts"].values():
        console.print(table(f"{part['title']} ({part['ended']}, {part['seconds']:.0f} s)", part["rows"]))
    if not args.small:
        rows = [{"name": name, "images_per_second": rate} for name, rate in PUBLISHED]
        console.print(table("Published rates, as their authors give them", rows))
    about = ", ".join(f"{key} {results[key]}" for key in ("device", "torch", "cuda", "python", "commit"))
    console.print(f"{about}; {results['seconds']:.0f} s in all. {folder}/results.json", soft_wrap=True)
    if args.small and any(part["ended"] != "done" for part in results["parts"].values()):
        sys.exit(1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--small", action="store_true", help="tiny shapes, also on a CPU; a part that fails is an error"
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument(
        "--profile", action="store_true", help="list the kernels of Long-CLIP's and DIVA's steps in their logs"
    )
    parser.add_argument("--output", default="outputs/gpu", help="folder for results.json and the logs")
    main(parser.parse_args())
