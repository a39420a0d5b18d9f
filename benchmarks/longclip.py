"""One Long-CLIP step against a plain one: texts padded to the context, a pass for each caption, an SVD.

    python benchmarks/longclip.py step                      # ViT-B-32, batch 32, fp32: time, operations, agreement
    python benchmarks/longclip.py step --model ViT-L-14 --batch 256 --bf16 --components 32     # on a GPU
    python benchmarks/longclip.py memory                    # peak memory against the batch, with and without chunks

Numbers that were measured are in RESULTS.md. Captions have ShareGPT4V's lengths, in tokens: long 175 +- 40, cut at 248;
short 25 +- 8.
"""

import argparse
import os
import resource
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from hydra.utils import instantiate
from measure import alone, matrix_ceiling
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from clipfix import CONF, PACKAGE
from clipfix.backbone import Backbone
from clipfix.methods.longclip import LongCLIP

GB = 2**30


class PlainLongCLIP(LongCLIP):
    """The same losses from open_clip's own forward, as a port of the paper would be written first."""

    def loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        model = self.backbone.model
        long, short = (model.encode_text(self.backbone.tokenize(batch[name])) for name in ("long", "caption"))
        image, long, short = (
            F.normalize(part.float(), dim=-1) for part in (self.backbone.encode_image(batch["image"]), long, short)
        )
        mean = image.mean(0)
        directions = torch.linalg.svd(image - mean, full_matrices=False).Vh[: self.components]
        reduced = (image - mean) @ directions.T @ directions + mean
        return {
            name: self.contrast(pictures, texts, self.label_smoothing)
            for name, pictures, texts in (("long", image, long), ("short", reduced, short))
        }


def build(kind: type[LongCLIP], model: str, device: str, **settings: Any) -> LongCLIP:
    torch.manual_seed(0)
    name = str(PACKAGE / "tiny" / "clip") if model == "tiny" else model
    backbone = Backbone(name, None if model == "tiny" else "random")
    torch.nn.init.normal_(backbone.text.get_parameter("token_embedding.weight"), std=0.02)  # words differ
    config = OmegaConf.load(CONF / "method" / "longclip.yaml")
    config = OmegaConf.merge(config, {"_target_": f"{kind.__module__}.{kind.__qualname__}", **settings})
    method: LongCLIP = instantiate(config, backbone=backbone)
    return method.to(device)


def captions(rows: int, image_size: int, device: str) -> dict[str, Any]:
    """A batch; a caption of n tokens is n - 2 words of one token each."""
    generator = torch.Generator().manual_seed(0)

    def texts(mean: float, deviation: float) -> list[str]:
        lengths = (mean + deviation * torch.randn(rows, generator=generator)).round().int().clamp(min=4).tolist()
        words = ("star", "house", "fish", "red")
        picks = torch.randint(len(words), (sum(lengths),), generator=generator).tolist()
        return [" ".join(words[picks.pop()] for _ in range(length - 2)) for length in lengths]

    images = torch.rand(rows, 3, image_size, image_size, generator=generator)
    return {"image": images.to(device), "long": texts(175, 40), "caption": texts(25, 8)}


def stepper(method: LongCLIP, batch: dict[str, Any], bf16: bool) -> Callable[[], float]:
    """Forward, backward and update; returns the loss."""
    optimizer = method.configure_optimizers()["optimizer"]
    device = batch["image"].device.type

    def step() -> float:
        method.seed_draws(0)
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            loss = torch.stack(list(method.loss(batch).values())).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def compare_steps(model: str, rows: int, components: int, bf16: bool, repeats: int) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    settings = {"components": components, "optimizer": {"lr": 0.0}}  # weights stay, so every step does the same
    methods = {
        "plain": build(PlainLongCLIP, model, device, **settings),
        "clipfix": build(LongCLIP, model, device, **settings),
    }
    batch = captions(rows, methods["plain"].needs.image_size, device)
    steps = {name: stepper(method, batch, bf16) for name, method in methods.items()}
    operations, losses, gradients = {}, {}, {}
    for name, step in steps.items():
        with FlopCounterMode(display=False) as counter:
            losses[name] = step()
        operations[name] = counter.get_total_flops()
        gradients[name] = torch.cat([p.grad.flatten() for p in methods[name].parameters() if p.grad is not None])
    difference = (gradients["plain"] - gradients["clipfix"]).norm() / gradients["plain"].norm()
    gradients.clear()

    wall: dict[str, list[float]] = {name: [] for name in steps}
    memory = dict.fromkeys(steps, 0.0)
    for _ in range(repeats):  # in turn, so that a machine that drifts drifts for both
        for name, step in steps.items():
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            step()  # ends with .item(), which waits for the device
            wall[name].append(time.perf_counter() - start)
            memory[name] = torch.cuda.max_memory_allocated() / GB if device == "cuda" else float("nan")
    ceiling = matrix_ceiling(device, torch.bfloat16 if bf16 else torch.float32)
    table = Table(
        title=f"{model}, batch {rows}, {'bf16' if bf16 else 'fp32'}, {device}, {torch.get_num_threads()} threads"
    )
    for column in ("", "s a step", "images/s", "10^12 operations", "share of matrix ceiling", "peak GB"):
        table.add_column(column, justify="right")
    for name in steps:
        seconds = median(wall[name])
        table.add_row(
            name,
            f"{seconds:.3f} ({min(wall[name]):.3f} to {max(wall[name]):.3f})",
            f"{rows / seconds:.2f}",
            f"{operations[name] / 1e12:.2f}",
            f"{100 * operations[name] / seconds / ceiling:.0f} %",
            f"{memory[name]:.1f}",
        )
    ratios = [plain / ours for plain, ours in zip(wall["plain"], wall["clipfix"], strict=True)]
    console = Console(width=140)
    console.print(table)
    console.print(
        f"plain / clipfix: {median(ratios):.2f} in time ({min(ratios):.2f} to {max(ratios):.2f}), "
        f"{operations['plain'] / operations['clipfix']:.2f} in operations. Loss {losses['plain']:.6f} and "
        f"{losses['clipfix']:.6f}, gradients differ by {difference:.1e} of their norm."
    )


def peak_gb(model: str, rows: int, chunk: int | None) -> float:
    """What one step adds to the process's peak memory (resident set, or the GPU's own count), batch included."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    method = build(LongCLIP, model, device, chunk=chunk, start_scale=None)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if device == "cuda":
        before = torch.cuda.memory_allocated()
    stepper(method, captions(rows, method.needs.image_size, device), bf16=False)()
    after = (
        torch.cuda.max_memory_allocated()
        if device == "cuda"
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    return (after - before) / GB


def compare_memory(model: str, chunk: int, batches: list[int]) -> None:
    table = Table(title=f"Peak memory of a step, {model}, GB")
    for column in ("batch", "whole", f"in chunks of {chunk}"):
        table.add_column(column, justify="right")
    # Else glibc keeps freed pieces for itself, and the resident set grows with the number of chunks.
    os.environ |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    for rows in batches:
        peaks = [f"{alone(peak_gb, model, rows, part):.2f}" for part in (None, chunk)]
        table.add_row(str(rows), *peaks)
    Console().print(table)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    step = verbs.add_parser("step")
    step.add_argument("--model", default="ViT-B-32", help="an open_clip architecture, or tiny")
    step.add_argument("--batch", type=int, default=32)
    step.add_argument("--components", type=int, default=16)
    step.add_argument("--bf16", action="store_true")
    step.add_argument("--repeats", type=int, default=3)
    memory = verbs.add_parser("memory")
    memory.add_argument("--model", default="tiny")
    memory.add_argument("--chunk", type=int, default=64)
    memory.add_argument("--batches", type=int, nargs="+", default=[64, 128, 256, 512])
    asked = parser.parse_args()
    if asked.verb == "step":
        compare_steps(asked.model, asked.batch, asked.components, asked.bf16, asked.repeats)
    else:
        compare_memory(asked.model, asked.chunk, asked.batches)
