"""One Long-CLIP step against a plain one: texts padded to the context, a pass for each caption, an SVD.

    python benchmarks/longclip.py step                      # ViT-B-32, batch 32, fp32: time, operations, agreement
    python benchmarks/longclip.py step chunks --model ViT-L-14 --batch 256 --bf16 --compile --components 32 \
        --chunk 256 --batches 2048 8192                     # on a GPU: a step, then the largest batch by chunks
    python benchmarks/longclip.py memory                    # peak memory against the batch, with and without chunks

Numbers that were measured are in RESULTS.md. Captions have ShareGPT4V's lengths, in tokens: long 175 +- 40, cut at 248;
short 25 +- 8. Token ids come with the batch, as the loader's workers make them.
"""

import argparse
import os
import resource
from collections.abc import Callable
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from hydra.utils import instantiate
from measure import GB, Results, alone, in_turn, matrix_ceiling, method_config, name_of, profile
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import clipfix.models.packed_text as packing
from clipfix import PACKAGE
from clipfix.methods.longclip import LongCLIP
from clipfix.models.attention import SelfAttention
from clipfix.models.clip import Backbone


class PlainLongCLIP(LongCLIP):
    """The same losses from open_clip's own forward, as a port of the paper would be written first."""

    def loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        model = self.backbone.model
        long, short = (model.encode_text(self.tokens(batch, name)) for name in ("long", "caption"))
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


def build(kind: type[LongCLIP], model: str, device: str, compiled: bool = False, **settings: Any) -> LongCLIP:
    torch.manual_seed(0)
    name = str(PACKAGE / "tiny" / "clip") if model == "tiny" else model
    with torch.device(device):
        backbone = Backbone(name, None if model == "tiny" else "random", compiled=compiled)
    torch.nn.init.normal_(backbone.text.get_parameter("token_embedding.weight"), std=0.02)  # words differ
    config = OmegaConf.merge(
        method_config("longclip"), {"_target_": f"{kind.__module__}.{kind.__qualname__}", **settings}
    )
    method: LongCLIP = instantiate(config, backbone=backbone)
    if kind is PlainLongCLIP:
        for module in method.modules():
            if type(module) is SelfAttention:
                module.__class__ = nn.MultiheadAttention
    return method.to(device)


def captions(method: LongCLIP, rows: int, device: str) -> dict[str, Any]:
    """A batch with its token ids; a caption of n tokens is n - 2 words of one token each."""
    generator = torch.Generator().manual_seed(0)

    def texts(mean: float, deviation: float) -> list[str]:
        lengths = (mean + deviation * torch.randn(rows, generator=generator)).round().int().clamp(min=4).tolist()
        words = ("star", "house", "fish", "red")
        picks = torch.randint(len(words), (sum(lengths),), generator=generator).tolist()
        return [" ".join(words[picks.pop()] for _ in range(length - 2)) for length in lengths]

    side = method.needs.image_size
    images = torch.rand(rows, 3, side, side, generator=torch.Generator(device).manual_seed(0), device=device)
    batch: dict[str, Any] = {"image": images, "long": texts(175, 40), "caption": texts(25, 8)}
    for encode in method.needs.encode:
        batch |= encode(batch)
    batch["tokens"] = {name: ids.to(device) for name, ids in batch["tokens"].items()}
    return batch


def stepper(method: LongCLIP, batch: dict[str, Any], bf16: bool) -> Callable[[], float]:
    """Forward, backward and update; returns the loss."""
    optimizer = method.configure_optimizers()["optimizer"]
    device = batch["image"].device.type

    def step() -> float:
        method.seed_draws(0)
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            loss = torch.stack(list(method.loss(batch).values())).sum()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


@contextmanager
def countable() -> Any:
    """Attention in calls whose operations torch can count, and nothing compiled."""
    one_call, packing.HAS_VARLEN = packing.HAS_VARLEN, False
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        packing.HAS_VARLEN = one_call


def gradient(method: LongCLIP) -> Tensor:
    return torch.cat([p.grad.flatten() for p in method.parameters() if p.grad is not None])


def compare_steps(asked: argparse.Namespace, results: Results) -> None:
    device, settings = asked.device, {"components": asked.components, "optimizer": {"lr": 0.0}}
    ceiling = matrix_ceiling(device, torch.bfloat16 if asked.bf16 else torch.float32)
    kinds = {"plain": (PlainLongCLIP, False), "clipfix": (LongCLIP, False)}
    if asked.compile:
        kinds["clipfix, compiled"] = (LongCLIP, True)
    results.add("matrix ceiling", note=f"{ceiling / 1e12:.1f} TFLOP/s of one product", ceiling=ceiling)
    # Weights stay where they are, as the rate is zero: every step does the same.
    methods = {name: build(kind, asked.model, device, c, **settings) for name, (kind, c) in kinds.items()}
    rows = asked.batch
    while True:
        batch = captions(methods["plain"], rows, device)
        steps = {name: stepper(method, batch, asked.bf16) for name, method in methods.items()}
        try:
            operations, losses, far = agreement(steps, methods)
            break
        except torch.cuda.OutOfMemoryError:
            results.add(f"batch {rows}", note="out of memory, so half of it")
            rows //= 2
    wall, peak = in_turn(steps, asked.repeats, device)
    if asked.profile:
        profile(name := list(steps)[-1], steps[name], device)
    for name, seconds in wall.items():
        second = median(seconds)
        results.add(
            f"{name}, batch {rows}",
            images_per_second=rows / second,
            milliseconds=1000 * second,
            seconds=seconds,
            speedup=median(plain / ours for plain, ours in zip(wall["plain"], seconds, strict=True)),
            mfu=operations[name] / second / ceiling,
            peak_gb=peak[name],
            teraflop=operations[name] / 1e12,
            note=f"{operations[name] / 1e12:.2f} TFLOP, loss {losses[name]:.6f}, gradient {far[name]:.0e} off",
        )


def agreement(
    steps: dict[str, Callable[[], float]], methods: dict[str, LongCLIP]
) -> tuple[dict[str, int], dict[str, float], dict[str, float]]:
    """Operations, loss and how far the gradient is from plain's, of each; compiles what is to be compiled."""
    operations, losses, far = {}, {}, {}
    expected = None
    for name, step in steps.items():
        with FlopCounterMode(display=False) as counter, countable():
            step()
        operations[name] = counter.get_total_flops()
        losses[name] = step()
        found = gradient(methods[name])
        expected = found if expected is None else expected
        far[name] = float((found - expected).norm() / expected.norm())
        methods[name].zero_grad()
    return operations, losses, far


# -- large batches -----------------------------------------------------------------------------------------------------


def large_batches(asked: argparse.Namespace, results: Results) -> None:
    """A step on batches of growing size, `chunk` rows at a time, until memory ends."""
    device = asked.device
    settings = {"chunk": asked.chunk, "components": asked.components, "optimizer": {"lr": 0.0}}
    method = build(LongCLIP, asked.model, device, asked.compile, **settings)
    stepper(method, captions(method, 2 * asked.chunk, device), asked.bf16)()  # warms up, and compiles
    for rows in asked.batches:
        step = stepper(method, captions(method, rows, device), asked.bf16)
        wall, peak = in_turn({"step": step}, 1, device)
        name = f"clipfix{', compiled' if asked.compile else ''}, chunks of {asked.chunk}, batch {rows}"
        if not wall:
            results.add(name, note="out of memory")
            break
        (second,) = wall["step"]
        values = {"images_per_second": rows / second, "milliseconds": 1000 * second, "peak_gb": peak["step"]}
        results.add(name, **values)


def peak_gb(model: str, rows: int, chunk: int | None) -> float:
    """What one step adds to the process's peak memory (resident set), batch included."""
    method = build(LongCLIP, model, "cpu", chunk=chunk, start_scale=None)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    stepper(method, captions(method, rows, "cpu"), bf16=False)()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / GB


def compare_memory(asked: argparse.Namespace) -> None:
    table = Table(title=f"Peak memory of a step, {asked.model}, GB")
    for column in ("batch", "whole", f"in chunks of {asked.chunk}"):
        table.add_column(column, justify="right")
    # Else glibc keeps freed pieces for itself, and the resident set grows with the number of chunks.
    os.environ |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    for rows in asked.batches:
        peaks = [f"{alone(peak_gb, asked.model, rows, part):.2f}" for part in (None, asked.chunk)]
        table.add_row(str(rows), *peaks)
    Console().print(table)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verbs", nargs="+", choices=["step", "chunks", "memory"])
    parser.add_argument("--model", help="an open_clip architecture, or tiny; ViT-B-32, for memory tiny")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--batches", type=int, nargs="+", default=[64, 128, 256, 512], help="of chunks and memory")
    parser.add_argument("--chunk", type=int, default=64)
    parser.add_argument("--components", type=int, default=16)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--compile", action="store_true", help="a row more: blocks of both towers by torch.compile")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--profile", action="store_true", help="print which kernels the last row's time goes to")
    parser.add_argument("--json", help="where the rows are kept")
    asked = parser.parse_args()
    asked.model = asked.model or ("tiny" if "memory" in asked.verbs else "ViT-B-32")
    if "memory" in asked.verbs:
        compare_memory(asked)
    else:
        precision = "bf16" if asked.bf16 else "fp32"
        results = Results(f"Long-CLIP, {asked.model}, {precision}, {name_of(asked.device)}", asked.json)
        for verb in asked.verbs:
            {"step": compare_steps, "chunks": large_batches}[verb](asked, results)
            if asked.device == "cuda":
                torch.cuda.empty_cache()
        results.show()
