"""One Long-CLIP step, and a plain step: texts padded to the context, a pass for each caption, an SVD.

    python benchmarks/longclip.py step                      # ViT-B-32, batch 32, fp32: time, operations, agreement
    python benchmarks/longclip.py step chunks --model ViT-L-14 --batch 256 --bf16 --compile --components 32 \
        --chunk 256 --batches 2048 8192                     # on a GPU: a step, then the largest batch by chunks
    python benchmarks/longclip.py memory                    # peak memory against the batch, with and without chunks

Measured numbers are in RESULTS.md. Captions have the lengths of ShareGPT4V in tokens: long ones 175 +- 40, truncated at
248; short ones 25 +- 8. Token ids are part of the batch, as the loader's workers provide them.
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
    """The same losses by the forward of open_clip in the most direct form, as in a port of the paper."""

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
    config = method_config("longclip", _target_=f"{kind.__module__}.{kind.__qualname__}", **settings)
    method: LongCLIP = instantiate(config, backbone=backbone)
    if kind is PlainLongCLIP:
        for module in method.modules():
            if type(module) is SelfAttention:
                module.__class__ = nn.MultiheadAttention  # type: ignore[assignment]
    return method.to(device)


def captions(method: LongCLIP, rows: int, device: str) -> dict[str, Any]:
    """Return a batch with token ids. A caption of n tokens has n - 2 words of one token each."""
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
    """Return a function that does forward, backward and update, and returns the loss."""
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
    """Use attention whose operations torch can count, and no compiled code, within the block."""
    one_call, packing.HAS_VARLEN = packing.HAS_VARLEN, False
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        packing.HAS_VARLEN = one_call


def gradient(method: LongCLIP) -> Tensor:
    return torch.cat([p.grad.flatten() for p in method.parameters() if p.grad is not None])


def compare_steps(args: argparse.Namespace, results: Results) -> None:
    device, settings = args.device, {"components": args.components, "optimizer": {"lr": 0.0}}
    ceiling = matrix_ceiling(device, torch.bfloat16 if args.bf16 else torch.float32)
    kinds = {"plain": (PlainLongCLIP, False), "clipfix": (LongCLIP, False)}
    if args.compile:
        kinds["clipfix, compiled"] = (LongCLIP, True)
    results.add("matrix ceiling", note=f"{ceiling / 1e12:.1f} TFLOP/s of one product", ceiling=ceiling)
    # The learning rate is zero, so all steps are equal.
    methods = {name: build(kind, args.model, device, c, **settings) for name, (kind, c) in kinds.items()}
    rows = args.batch
    while True:
        batch = captions(methods["plain"], rows, device)
        steps = {name: stepper(method, batch, args.bf16) for name, method in methods.items()}
        try:
            operations, losses, far = agreement(steps, methods)
            break
        except torch.cuda.OutOfMemoryError:
            results.add(f"batch {rows}", note="out of memory, so half of it")
            rows //= 2
    wall, peak = in_turn(steps, args.repeats, device)
    if args.profile:
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
    """Return operations, loss and difference of the gradient from the plain step, for each; also compiles."""
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


def large_batches(args: argparse.Namespace, results: Results) -> None:
    """Time a step on batches of growing size, in chunks of `chunk` rows, until memory ends."""
    device = args.device
    settings = {"chunk": args.chunk, "components": args.components, "optimizer": {"lr": 0.0}}
    method = build(LongCLIP, args.model, device, args.compile, **settings)
    stepper(method, captions(method, 2 * args.chunk, device), args.bf16)()  # warm-up and compilation
    for rows in args.batches:
        step = stepper(method, captions(method, rows, device), args.bf16)
        wall, peak = in_turn({"step": step}, 1, device)
        name = f"clipfix{', compiled' if args.compile else ''}, chunks of {args.chunk}, batch {rows}"
        if not wall:
            results.add(name, note="out of memory")
            break
        (second,) = wall["step"]
        values = {"images_per_second": rows / second, "milliseconds": 1000 * second, "peak_gb": peak["step"]}
        results.add(name, **values)


def peak_gb(model: str, rows: int, chunk: int | None) -> float:
    """Return the GB that one step adds to the peak resident set, batch included."""
    method = build(LongCLIP, model, "cpu", chunk=chunk, start_scale=None)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    stepper(method, captions(method, rows, "cpu"), bf16=False)()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / GB


def compare_memory(args: argparse.Namespace) -> None:
    table = Table(title=f"Peak memory of a step, {args.model}, GB")
    for column in ("batch", "whole", f"in chunks of {args.chunk}"):
        table.add_column(column, justify="right")
    # Otherwise glibc keeps freed memory, and the resident set grows with the number of chunks.
    os.environ |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    for rows in args.batches:
        peaks = [f"{alone(peak_gb, args.model, rows, part):.2f}" for part in (None, args.chunk)]
        table.add_row(str(rows), *peaks)
    Console().print(table)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verbs", nargs="+", choices=["step", "chunks", "memory"])
    parser.add_argument("--model", help="an open_clip architecture, or tiny; by default ViT-B-32, and tiny for memory")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument(
        "--batches", type=int, nargs="+", default=[64, 128, 256, 512], help="batch sizes of chunks and memory"
    )
    parser.add_argument("--chunk", type=int, default=64)
    parser.add_argument("--components", type=int, default=16)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--compile", action="store_true", help="add a row: blocks of both towers by torch.compile")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--profile", action="store_true", help="print the kernels of the last row by their time")
    parser.add_argument("--json", help="file for the rows")
    args = parser.parse_args()
    args.model = args.model or ("tiny" if "memory" in args.verbs else "ViT-B-32")
    if "memory" in args.verbs:
        compare_memory(args)
    else:
        precision = "bf16" if args.bf16 else "fp32"
        results = Results(f"Long-CLIP, {args.model}, {precision}, {name_of(args.device)}", args.json)
        for verb in args.verbs:
            {"step": compare_steps, "chunks": large_batches}[verb](args, results)
            if args.device == "cuda":
                torch.cuda.empty_cache()
        results.show()
