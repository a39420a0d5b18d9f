"""FFF's sigmoid loss with mined positives, forward and backward: in tiles, and with the full N x kN matrix.

    python benchmarks/fff.py mined                          # N = 2048, 4096, 8192; the dense loss takes 6 GB on a CPU
    python benchmarks/fff.py mined --samples 8192 --tiles 128 256 512 1024
    python benchmarks/fff.py device --samples 32768         # on a GPU: dense, tiled, siglip-kernel; fp32 and TF32

Measured numbers are in RESULTS.md. Peaks are the memory that the loss needs beyond the features: of the resident set of
a process that does nothing else, or as the GPU counts it.
"""

import argparse
import importlib.util
import os
import resource
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from measure import GB, Results, above, alone, in_turn, name_of
from rich.console import Console
from rich.table import Table
from torch import Tensor

from clipfix.functional.positives import ReferenceFeatures, Thresholds, mine
from clipfix.functional.sigmoid import sigmoid_loss
from clipfix.training.precision import fp32_products

BARS = Thresholds(image_text=0.27, supported=0.24, image_image=0.92, text_text=0.99)  # values of the paper


def features(samples: int, captions: int, dim: int, device: str) -> tuple[ReferenceFeatures, tuple[Tensor, ...]]:
    """Return features of the reference, and the trained tensors: image, text, scale, bias.

    In each group of four samples, the first two have nearly the same picture, and the last two have the same caption
    and similar pictures. Captions have a cosine of 0.27 +- 0.04 to their picture, so that each condition has positives.
    All operations are in place, because their peak of memory would hide the measured one.
    """
    generator = torch.Generator(device).manual_seed(0)

    def unit(*shape: int) -> Tensor:
        drawn = torch.randn(*shape, dim, generator=generator, device=device)
        return drawn.div_(drawn.norm(dim=-1, keepdim=True))

    shared = unit(samples // 4, 2, 1)
    image = unit(samples // 4, 2, 2).mul_(torch.tensor([0.2, 0.5], device=device)[:, None, None]).add_(shared)
    image = image.div_(image.norm(dim=-1, keepdim=True)).flatten(0, 2)
    text = unit(samples // 4, 2, 2, captions)
    text[:, 1] = text[:, 1, :1, :1].clone()  # the same caption, before each is moved towards its picture
    text[:, 0].mul_(0.96).add_(image.view(-1, 2, 2, 1, dim)[:, 0], alpha=0.27)
    text[:, 1].mul_(0.96).add_(shared[:, 1, :, None], alpha=0.3)
    text = text.div_(text.norm(dim=-1, keepdim=True)).flatten(0, 2)
    known = ReferenceFeatures(image, text, text.mean(dim=1))
    trained = []
    for reference in (image, text):
        moved = unit(*reference.shape[:-1]).mul_(0.3).add_(reference)
        trained.append(moved.div_(moved.norm(dim=-1, keepdim=True)).requires_grad_())
    scale, bias = (torch.tensor(value, device=device, requires_grad=True) for value in (100.0, -20.0))
    return known, (*trained, scale, bias)


def mined_dense(known: ReferenceFeatures) -> Tensor:
    """Return the mined positives as a full matrix [N, N, k]."""
    pair = torch.einsum("id,jkd->ijk", known.image, known.text)
    alike = (known.image @ known.image.T > BARS.image_image) | (known.mean_text @ known.mean_text.T > BARS.text_text)
    own = torch.eye(len(pair), dtype=torch.bool, device=pair.device)
    return own[..., None] | (pair > BARS.image_text) | ((pair > BARS.supported) & alike[..., None])


def dense(known: ReferenceFeatures, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Return the loss of the full matrix, in the most direct form."""
    with torch.no_grad():
        sign = torch.where(mined_dense(known), -1.0, 1.0).flatten(1)
    logits = scale * image @ text.flatten(0, 1).T + bias
    return F.softplus(sign * logits).sum()


def tiled(
    tile: int, counts: Counter[str], known: ReferenceFeatures, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor
) -> Tensor:
    """Return the loss in tiles as FFF computes it, counts included."""

    def positives(part: slice) -> Tensor:
        with fp32_products("highest"):
            found = mine(known, known.rows(part), BARS, first_row=-part.start)
        for name in ("image_text", "image_image", "text_text"):
            counts[name] += getattr(
                found, name
            ).count_nonzero()  # a tensor: .item() would wait for the GPU in each tile
        return found.any()

    return sigmoid_loss(image, text, scale, bias, positives, tile)


def tiled_own(tile: int, known: ReferenceFeatures, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Return the loss in tiles with only the captions of the same sample as positives."""
    rows = torch.arange(len(image), device=image.device)
    own = lambda part: (rows[:, None] == rows[part])[..., None].expand(-1, -1, text.shape[1])  # noqa: E731
    return sigmoid_loss(image, text, scale, bias, own, tile)


def fused_own(known: ReferenceFeatures, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Return the same loss by siglip-kernel.

    It divides the positives of a row by their number, which is one if captions are the rows.
    """
    from siglip_kernel import fused_siglip_plus_loss

    samples, captions = text.shape[:2]
    group = torch.arange(samples, device=text.device)
    columns = (text.flatten(0, 1), image, scale.log(), bias, group.repeat_interleave(captions), group)
    return fused_siglip_plus_loss(*columns, symmetric=False, num_groups=samples) * (samples**2 * captions)


def measure(kind: str, samples: int, captions: int, dim: int, tile: int, repeats: int, path: str) -> dict[str, Any]:
    """Return the shortest seconds, GB above the features, and positives per image, of forward and backward.

    The loss and gradients are saved to `path`.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    counts: Counter[str] = Counter()
    losses: dict[str, Callable[..., Tensor]] = {
        "dense": dense,
        "tiled": partial(tiled, tile, counts),
    }

    def step(known: ReferenceFeatures, trained: tuple[Tensor, ...]) -> Tensor:
        loss = losses[kind](known, *trained)
        loss.backward()
        loss.item()  # waits for the device
        return loss

    warm = 64 if device == "cpu" else samples  # kernels are selected by shape and compiled
    step(*features(warm, captions, dim, device))
    known, trained = features(samples, captions, dim, device)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    clock = (
        time.perf_counter if device == "cuda" else time.process_time
    )  # CPU time of all threads, independent of other processes
    seconds = []
    for _ in range(repeats):
        counts.clear()
        for tensor in trained:
            tensor.grad = None
        start = clock()
        loss = step(known, trained)
        seconds.append(clock() - start)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if device == "cuda":
        after = torch.cuda.max_memory_allocated()
    torch.save([loss.detach().cpu(), *(tensor.grad.cpu() for tensor in trained if tensor.grad is not None)], path)
    positives = {name: float(count) / samples for name, count in counts.items()}
    return {"gb": (after - before) / GB, "seconds": min(seconds), "positives": positives}


def differences(one: str, other: str) -> list[float]:
    """Return the largest difference of the loss and of each gradient, divided by the largest value."""
    pairs = zip(torch.load(one), torch.load(other), strict=True)
    return [float((a.double() - b.double()).abs().max() / a.double().abs().max()) for a, b in pairs]


def compare(
    plain: str, ours: str, sizes: list[int], captions: int, dim: int, tiles: list[int], repeats: int, most: int
) -> None:
    device = (
        torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU seconds, {torch.get_num_threads()} threads"
    )
    table = Table(title=f"{ours} against {plain}, {captions} captions, dim {dim}, fp32, {device}; {plain} / ours")
    for column in f"N,tile,{plain} GB,ours GB,ratio,{plain} s,ours s,ratio,loss,gradients".split(","):
        table.add_column(column, justify="right")
    console, positives = Console(width=140), dict[str, float]()
    with tempfile.TemporaryDirectory() as folder:
        one, other = (str(Path(folder) / name) for name in (plain, ours))
        for samples in sizes:
            whole = None
            if samples <= most:
                whole = alone(measure, plain, samples, captions, dim, 0, repeats, one)
            for tile in tiles:
                part = alone(measure, ours, samples, captions, dim, tile, repeats, other)
                positives |= part["positives"]
                cells = {key: ["", f"{part[key]:.2f}", ""] for key in ("gb", "seconds")}
                apart = ["", ""]
                if whole is not None:
                    for key, row in cells.items():
                        row[0], row[2] = f"{whole[key]:.2f}", f"{whole[key] / part[key]:.1f}"
                    loss, *gradients = alone(differences, one, other)
                    apart = [f"{loss:.0e}", f"{max(gradients):.0e}"]
                table.add_row(str(samples), str(tile), *cells["gb"], *cells["seconds"], *apart)
    console.print(table)
    for name, count in positives.items():
        console.print(f"{name}: {count:.2f} positives an image beyond its own {captions}")


def on_device(args: argparse.Namespace) -> None:
    """Measure all implementations in one process, in fp32 and TF32.

    Mined pairs: dense and in tiles. Pairs of the same sample: in tiles and by siglip-kernel.
    """
    device, (samples,) = args.device, args.samples
    title = f"FFF's sigmoid loss, N {samples}, {args.captions} captions, dim {args.dim}, {name_of(device)}"
    results = Results(title, args.json)
    counts: Counter[str] = Counter()
    ways: dict[str, Callable[..., Tensor]] = {"mined, dense": dense}
    ways |= {f"mined, tiles of {tile}": partial(tiled, tile, counts) for tile in args.tiles}
    ways |= {f"own pairs, tiles of {tile}": partial(tiled_own, tile) for tile in args.tiles}
    if device == "cuda" and importlib.util.find_spec("siglip_kernel"):
        ways["own pairs, siglip-kernel"] = fused_own
    known, trained = features(samples, args.captions, args.dim, device)
    held = torch.cuda.memory_allocated() / GB if device == "cuda" else 0.0
    expected: dict[str, list[Tensor]] = {}  # of the first implementation of each kind of pairs, in fp32
    for precision in ("highest", "high") if device == "cuda" else ("highest",):
        wall: dict[str, float] = {}
        for name, way in ways.items():

            def step(way: Callable[..., Tensor] = way) -> Tensor:
                for tensor in trained:
                    tensor.grad = None
                loss = way(known, *trained)
                loss.backward()
                return loss.detach()

            with fp32_products(precision):
                try:
                    loss = step()  # selects and compiles kernels
                    times, peak = in_turn({name: step}, args.repeats, device)
                except torch.cuda.OutOfMemoryError:
                    times = {}
            label = f"{name}, {'TF32' if precision == 'high' else 'fp32'}"
            if not times:
                torch.cuda.empty_cache()
                results.add(label, note="out of memory")
                continue
            values = [loss, *(tensor.grad for tensor in trained if tensor.grad is not None)]
            kind = name.partition(",")[0]
            others = expected.setdefault(kind, [value.clone() for value in values])
            far = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(values, others, strict=True))
            wall[name] = min(times[name])
            first = next(other for other in ways if other.startswith(kind))
            results.add(
                label,
                milliseconds=1000 * wall[name],
                speedup=wall[first] / wall[name] if first in wall else None,
                peak_gb=above(peak[name], held),
                note=f"loss and gradients {far:.0e} from those of the first way" if far else "",
            )
    results.show()
    steps = (args.repeats + 1) * (2 if device == "cuda" else 1) * len(args.tiles)
    for name, count in counts.items():
        print(f"{name}: {float(count) / samples / steps:.2f} positives an image beyond its own {args.captions}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=["mined", "device"])
    parser.add_argument("--samples", type=int, nargs="+", default=[2048, 4096, 8192], help="N, multiples of 4")
    parser.add_argument("--captions", type=int, default=5)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--tiles", type=int, nargs="+", default=[256])
    parser.add_argument("--repeats", type=int, default=1, help="the shortest time is reported")
    parser.add_argument("--most", type=int, default=8192, help="the largest N of the dense loss")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", help="file for the rows of `device`")
    args = parser.parse_args()
    if args.verb == "device":
        on_device(args)
    else:
        # Otherwise glibc keeps freed memory, and the resident set grows with the number of tiles.
        os.environ |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
        ways = ("dense", "tiled")
        compare(*ways, args.samples, args.captions, args.dim, args.tiles, args.repeats, args.most)
