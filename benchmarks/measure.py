"""Tools of the benchmarks: ceilings of a device, timing of steps in turn, and results written after every row."""

import json
import multiprocessing
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

import clipfix.__main__  # noqa: F401  the resolvers that the configs use
from clipfix import CONF

GB = 2**30
COLUMNS = {  # key of a row: heading and format
    "images_per_second": ("images/s", "{:.1f}"),
    "milliseconds": ("ms a step", "{:.1f}"),
    "speedup": ("plain / this", "{:.2f}"),
    "mfu": ("of the ceiling", "{:.0%}"),
    "peak_gb": ("peak GB", "{:.2f}"),
    "note": ("", "{}"),
}


def method_config(name: str, *words: str, **changes: Any) -> DictConfig:
    """Return the config of a method, as a run with a pretrained backbone composes it, with some keys changed."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        node = compose("config", [f"method={name}", "backbone=vit-b32", "data.train=none", *words]).method
    values = OmegaConf.to_container(node, resolve=False)
    assert isinstance(values, dict)
    return OmegaConf.create({**values, **changes})


class Results:
    """Rows of one benchmark, printed as a table at the end and written as JSON after each row.

    A benchmark that runs out of memory or time keeps the rows before.
    """

    def __init__(self, title: str, path: str | None = None) -> None:
        self.title, self.path, self.rows = title, path, list[dict[str, Any]]()

    def add(self, name: str, **values: Any) -> None:
        """Add a row, print it, and write all rows."""
        self.rows.append({"name": name, **values})
        print(f"{self.title}: {self.rows[-1]}", flush=True)
        if self.path:
            Path(self.path).write_text(json.dumps({"title": self.title, "rows": self.rows}, indent=1) + "\n")

    def show(self) -> None:
        """Print the table."""
        Console(width=160).print(table(self.title, self.rows))


def table(title: str, rows: list[dict[str, Any]]) -> Table:
    """Return a table of the rows, with the columns that any of them has."""
    shown = [column for column in COLUMNS if any(row.get(column) is not None for row in rows)]
    made = Table(title=title, title_justify="left")
    made.add_column("")
    for column in shown:
        made.add_column(COLUMNS[column][0], justify="left" if column == "note" else "right")
    for row in rows:
        cells = ("" if row.get(column) is None else COLUMNS[column][1].format(row[column]) for column in shown)
        made.add_row(row["name"], *cells)
    return made


def wait(device: str) -> None:
    """Wait until the device has finished its work."""
    if device == "cuda":
        torch.cuda.synchronize()


def name_of(device: str) -> str:
    """Return the name of the device."""
    return torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def matrix_ceiling(device: str, dtype: torch.dtype) -> float:
    """Return operations per second of one large matrix product, the median of ten runs after three."""
    side = 8192 if device == "cuda" else 1024
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(13):
        wait(device)
        start = time.perf_counter()
        left @ right
        wait(device)
        seconds.append(time.perf_counter() - start)
    return 2 * side**3 / median(seconds[3:])


def in_turn(
    steps: Mapping[str, Callable[[], object]], repeats: int, device: str
) -> tuple[dict[str, list[float]], dict[str, float | None]]:
    """Time steps in turn, so that changes in the speed of the machine affect all of them.

    Returns:
        The seconds of each step, without steps that ran out of memory; and the peak of GPU memory in GB of each step,
        which includes all models on the GPU.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    peak: dict[str, float | None] = dict.fromkeys(steps)
    failed: set[str] = set()
    for _ in range(repeats):
        for name, step in steps.items():
            if name in failed:
                continue
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            wait(device)
            start = time.perf_counter()
            try:
                step()
                wait(device)
            except torch.cuda.OutOfMemoryError:
                failed.add(name)
                torch.cuda.empty_cache()
                continue
            seconds[name].append(time.perf_counter() - start)
            if device == "cuda":
                peak[name] = torch.cuda.max_memory_allocated() / GB
    return {name: times for name, times in seconds.items() if times and name not in failed}, peak


def above(peak: float | None, held: float) -> float | None:
    """Return what a peak of GPU memory adds to what was held before; None on a CPU, where no peak is known."""
    return None if peak is None else peak - held


def profile(name: str, step: Callable[[], object], device: str) -> None:
    """Print the kernels of a step by their time."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    gpu = device == "cuda"
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    with record(activities=kinds) as recorded:
        step()
        wait(device)
    by = "self_cuda_time_total" if gpu else "self_cpu_time_total"
    print(f"{name}\n{recorded.key_averages().table(sort_by=by, row_limit=30, max_name_column_width=90)}")


def alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a separate process, because a peak of memory hides all later, lower ones."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)
