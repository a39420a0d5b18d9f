"""One DIVA step, and a plain step: VAE in fp32 and text encoder in every step, tower and U-Net once for each draw.

    python benchmarks/diva.py step --compile                # tiny CLIP and generator: time, operations, agreement
    python benchmarks/diva.py step --generator sd21-small --batch 4               # shapes of Stable Diffusion, smaller
    python benchmarks/diva.py step batches --model ViT-L-14 --generator sd21-base --batch 32 --batches 16 32 64 \
        --autocast --bf16 --compile                         # on a GPU
    python benchmarks/diva.py split                         # the time of each part of a step
    python benchmarks/diva.py memory --generator sd21-small # memory with and without checkpointing

Measured numbers are in RESULTS.md. Weights are random, except those of the tiny models that are part of clipfix. Each
row of `step` keeps the switches of the rows before it and adds one.
"""

import argparse
import os
import resource
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from hydra.utils import instantiate
from measure import GB, Results, alone, in_turn, matrix_ceiling, method_config, name_of, profile
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel

from clipfix import PACKAGE
from clipfix.functional.denoising import denoising_loss
from clipfix.functional.patches import condition_from_tokens
from clipfix.methods.diva import DIVA
from clipfix.models.attention import SelfAttention
from clipfix.models.clip import Backbone
from clipfix.models.diffusion import Diffusion, Parts, clip_tokenizer
from clipfix.parts.condition import VisualTokens

GENERATORS = ("tiny", "sd21-small", "sd21-base")


class PlainDIVA(DIVA):
    """The same loss in the most direct form, as in a port of the paper."""

    def loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        images, diffusion, losses = batch["image"], self.diffusion, []
        rows, draws = len(images), self.timesteps.draws
        assert isinstance(self.condition, VisualTokens)
        with torch.autocast(images.device.type, enabled=False):
            latents = diffusion.encode(images)
        null = diffusion.condition([""] * rows)
        for draw in range(draws):
            self.seed_draws(0)  # the patches, noise and timesteps that DIVA draws
            pooled, patches = self.backbone.visual_tokens(images)
            picked = self.condition.patches(patches, self.ranks.sample)
            tokens = self.condition.projection(torch.cat([pooled[:, None], picked], dim=1))
            noise = self.ranks.sample(torch.randn, rows=rows, shape=(draws, *latents.shape[1:]))[:, draw]
            timesteps = self.timesteps.sample(rows, diffusion.num_timesteps, self.ranks)[:, draw]
            noisy = diffusion.add_noise(latents, noise, timesteps)
            predicted = diffusion.predict(
                noisy, timesteps, condition_from_tokens(tokens, null[0], self.condition.null_text)
            )
            losses.append(denoising_loss(predicted, diffusion.target(latents, noise, timesteps)))
        return {"denoising": torch.stack(losses).mean()}


# -- generators --------------------------------------------------------------------------------------------------------


def sd21(small: bool = False) -> tuple[UNet2DConditionModel, AutoencoderKL, CLIPTextModel]:
    """Return the parts of Stable Diffusion 2.1-base with random weights.

    The small variant has an eighth of all widths, and 256 px instead of 512.

    Source: the config.json files of stabilityai/stable-diffusion-2-1-base.
    """
    part, groups, side = (8, 8, 256) if small else (1, 32, 512)
    unet = UNet2DConditionModel(
        sample_size=side // 8, block_out_channels=tuple(width // part for width in (320, 640, 1280, 1280)),
        attention_head_dim=(5, 10, 20, 20), cross_attention_dim=1024 // part, use_linear_projection=True,
        norm_num_groups=groups,
    )  # fmt: skip
    vae = AutoencoderKL(
        sample_size=side, block_out_channels=tuple(width // part for width in (128, 256, 512, 512)),
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2,
        latent_channels=4, scaling_factor=0.18215, norm_num_groups=groups,
    )  # fmt: skip
    text = CLIPTextConfig(
        hidden_size=1024 // part, intermediate_size=4096 // part, num_hidden_layers=23, num_attention_heads=16,
        hidden_act="gelu", max_position_embeddings=77,
    )  # fmt: skip
    return unet, vae, CLIPTextModel(text)


def generator(name: str, device: str) -> Diffusion:
    """Return the tiny generator, or one with shapes of Stable Diffusion and random weights, on the device."""
    if name == "tiny":
        return Diffusion(str(PACKAGE / "tiny" / "diffusion")).to(device)
    torch.manual_seed(0)
    with torch.device(device):
        unet, vae, text = sd21(small=name == "sd21-small")
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    return Diffusion.from_parts(Parts(unet, vae, text, clip_tokenizer(77), scheduler)).to(device)


# -- a step ------------------------------------------------------------------------------------------------------------


def build(kind: type[DIVA], model: str, diffusion: Diffusion, device: str, checkpointing: bool = False) -> DIVA:
    """Return a method whose learning rate is zero, so that all steps are equal."""
    torch.manual_seed(0)
    with torch.device(device):
        backbone = Backbone(
            str(PACKAGE / "tiny" / "clip") if model == "tiny" else model,
            None if model == "tiny" else "random",
            checkpointing=checkpointing,
        )
    words = ["method.optimizer.lr=0"]
    if model == "tiny":  # which has fewer patches
        words += ["patches@method.condition.patches=none", "method.condition.null_text=mean"]
    target = f"{kind.__module__}.{kind.__qualname__}"
    config = method_config("diva", *words, _target_=target, diffusion=None)
    if checkpointing:
        diffusion.unet.enable_gradient_checkpointing()
    method: DIVA = instantiate(config, backbone=backbone, diffusion=diffusion)
    if kind is PlainDIVA:
        for module in method.modules():
            if type(module) is SelfAttention:
                module.__class__ = nn.MultiheadAttention  # type: ignore[assignment]
    return method.to(device)


def pictures(method: DIVA, rows: int, stored: bool) -> dict[str, Any]:
    """Return a batch of noise pictures, with latents if a run would read them from shards."""
    side, device = method.needs.image_size, method.device
    made = torch.rand(rows, 3, side, side, generator=torch.Generator(device).manual_seed(0), device=device)
    batch = {"image": made}
    if stored:
        batch["latents"] = torch.cat([method.diffusion.encode(part) for part in made.split(8)])
    return batch


def stepper(method: DIVA, batch: dict[str, Any], autocast: bool) -> Callable[[], float]:
    """Return a function that does forward, backward and update, and returns the loss."""
    optimizer = method.configure_optimizers()["optimizer"]

    def step() -> float:
        method.seed_draws(0)
        optimizer.zero_grad()
        with torch.autocast(method.device.type, torch.bfloat16, enabled=autocast):
            loss = method.loss(batch)["denoising"]
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def gradient(method: DIVA) -> Tensor:
    return torch.cat([p.grad.flatten().float() for p in method.parameters() if p.grad is not None])


def precision_of(args: argparse.Namespace) -> torch.dtype:
    return torch.bfloat16 if args.autocast else torch.float32


class Switch(NamedTuple):
    """A change of the step, and how to undo it."""

    name: str
    on: Callable[[], object]
    off: Callable[[], object] | None = None


def switches_for(args: argparse.Namespace, method: DIVA) -> list[Switch]:
    """Return the changes that the arguments ask for, in the order of the rows."""
    unet, attention = method.diffusion.unet, ExitStack()
    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

    def compile_all() -> None:
        method.diffusion.compile_blocks()
        method.backbone.compile_blocks()

    switches = [Switch("clipfix", lambda: None), Switch("+ stored latents", lambda: None)]
    if args.bf16:
        switches.append(Switch("+ generator in bf16", lambda: method.diffusion.to(torch.bfloat16)))
    if args.device == "cuda":
        cudnn = sdpa_kernel(order, set_priority=True)
        switches.append(Switch("+ attention by cuDNN", lambda: attention.enter_context(cudnn), attention.close))
    if args.compile:
        switches.append(Switch("+ torch.compile of all blocks", compile_all))
    layout = {"on": torch.channels_last, "off": torch.contiguous_format}

    def lay_out(memory_format: torch.memory_format) -> None:
        unet.to(memory_format=memory_format)
        torch.compiler.reset()  # compiled graphs do not check the layout of weights

    to = {key: partial(lay_out, value) for key, value in layout.items()}
    if args.channels_last:
        switches.append(Switch("+ channels last", to["on"], to["off"]))
    return switches


def compare_steps(args: argparse.Namespace, results: Results) -> None:
    """Time the plain step, DIVA, and DIVA with one more switch in each row. Plain is repeated after each row.

    A switch that makes the step slower, and can be undone, is off again in the rows below.
    """
    device, rows = args.device, args.batch
    ceiling = args.ceiling * 1e12 if args.ceiling else matrix_ceiling(device, precision_of(args))
    results.add("matrix ceiling", note=f"{ceiling / 1e12:.1f} TFLOP/s", ceiling=ceiling)
    plain, ours = (build(kind, args.model, generator(args.generator, device), device) for kind in (PlainDIVA, DIVA))
    plain_step = stepper(plain, pictures(plain, rows, stored=False), args.autocast)
    expected: Tensor | None = None
    fastest = float("inf")
    for name, on, off in [Switch("plain", lambda: None), *switches_for(args, ours)]:
        on()
        method = plain if name == "plain" else ours
        stored = name not in ("plain", "clipfix")
        step = plain_step if name == "plain" else stepper(ours, pictures(ours, rows, stored), args.autocast)
        try:
            with FlopCounterMode(display=False) as counter, torch.compiler.set_stance("force_eager"):
                step()
            operations = counter.get_total_flops()
            begun = time.perf_counter()
            loss = step()  # compiles
            first = time.perf_counter() - begun
            found = gradient(method)
            expected = found if expected is None else expected
            far = float((found - expected).norm() / expected.norm())
            method.zero_grad()
            wall, peak = in_turn({"plain": plain_step, name: step}, args.repeats, device)
            if args.profile:
                profile(name, step, device)
        except torch.cuda.OutOfMemoryError:
            wall = {}
        plain.zero_grad()
        second = median(wall.get(name, [float("inf")]))
        if off and second > fastest:
            off()
        fastest = min(fastest, second)
        if name not in wall:
            results.add(f"{name}, batch {rows}", note="out of memory")
            continue
        results.add(
            f"{name}, batch {rows}",
            images_per_second=rows / second,
            milliseconds=1000 * second,
            seconds=wall[name],
            speedup=median(a / b for a, b in zip(wall["plain"], wall[name], strict=True)),
            mfu=operations / second / ceiling,
            peak_gb=peak[name],
            first_step=first,
            note=f"{operations / rows / 1e12:.4f} TFLOP/image, loss {loss:.6f}, gradient {far:.0e} off, "
            f"first step {first:.0f} s",
        )


def compare_batches(args: argparse.Namespace, results: Results) -> None:
    """Time steps of several batch sizes until memory ends, with stored latents, and bf16 and compiled if asked for."""
    device = args.device
    ceiling = args.ceiling * 1e12 if args.ceiling else matrix_ceiling(device, precision_of(args))
    ours = build(DIVA, args.model, generator(args.generator, device), device)
    if args.bf16:
        ours.diffusion.to(torch.bfloat16)
    if args.compile:
        ours.diffusion.compile_blocks()
        ours.backbone.compile_blocks()
    for rows in args.batches:
        step = stepper(ours, pictures(ours, rows, stored=True), args.autocast)
        try:
            with FlopCounterMode(display=False) as counter, torch.compiler.set_stance("force_eager"):
                step()
            step()
            wall, peak = in_turn({"step": step}, args.repeats, device)
        except torch.cuda.OutOfMemoryError:
            wall = {}
        if not wall:
            results.add(f"batch {rows}", note="out of memory")
            break
        second = median(wall["step"])
        results.add(
            f"fastest, batch {rows}" if args.compile else f"latents and bf16 alone, batch {rows}",
            images_per_second=rows / second,
            milliseconds=1000 * second,
            mfu=counter.get_total_flops() / second / ceiling,
            peak_gb=peak["step"],
        )


# -- where the time and the memory go ----------------------------------------------------------------------------------


def split(args: argparse.Namespace) -> None:
    """Print the seconds of each part for one batch. The last row is the saving by a frozen U-Net."""
    device, rows = args.device, args.batch
    diffusion = generator(args.generator, device)
    if args.bf16:
        diffusion.to(torch.bfloat16)
    method = build(DIVA, args.model, diffusion, device)
    diffusion, side = method.diffusion, method.needs.image_size
    images = torch.rand(rows, 3, side, side, device=device)
    count = rows * method.timesteps.draws
    latents = torch.randn(count, *diffusion.encode(images[:1]).shape[1:], device=device)
    timesteps = torch.randint(0, 1000, (count,), device=device)
    method.seed_draws(0)
    with torch.no_grad():
        condition = method.condition(*method.backbone.visual_tokens(images))
    condition = condition.repeat_interleave(method.timesteps.draws, dim=0)

    def unet(backward: bool, weights: bool = False) -> None:
        diffusion.unet.requires_grad_(weights)
        with torch.set_grad_enabled(backward):
            loss = diffusion.predict(latents, timesteps, condition.requires_grad_(backward)).square().mean()
        if backward:
            loss.backward()
        diffusion.unet.zero_grad()

    parts = {
        "text encoder, a text an image": lambda: diffusion.condition([""] * rows),
        "autoencoder": lambda: diffusion.encode(images),
        "visual tower, forward and backward": lambda: method.backbone.visual_tokens(images)[0].sum().backward(),
        "U-Net, forward alone": lambda: unet(backward=False),
        "U-Net, forward and backward to its condition": lambda: unet(backward=True),
        "the same with gradients of its weights": lambda: unet(backward=True, weights=True),
    }
    table = Table(title=f"{args.model} and {args.generator}, {rows} images, {count} draws, {device}")
    for column in ("", "s"):
        table.add_column(column, justify="right")
    for name, part in parts.items():
        seconds = []
        for _ in range(1 + args.repeats):
            clock = time.perf_counter if device == "cuda" else time.process_time
            start = clock()
            part()
            if device == "cuda":
                torch.cuda.synchronize()
            seconds.append(clock() - start)
        table.add_row(name, f"{median(seconds[1:]):.4f}")  # the first one warms up
    Console(width=120).print(table)


def peak_gb(kind: type[DIVA], model: str, shapes: str, rows: int, checkpointing: bool) -> float:
    """Return the GB that one step adds to the resident set of a process with the models."""
    method = build(kind, model, generator(shapes, "cpu"), "cpu", checkpointing=checkpointing)
    step = stepper(method, pictures(method, rows, stored=False), autocast=False)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / GB


def compare_memory(args: argparse.Namespace) -> None:
    # Otherwise glibc keeps freed memory.
    os.environ |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    table = Table(title=f"Peak memory of a step, {args.model} and {args.generator}, {args.batch} images")
    for column in ("", "GB"):
        table.add_column(column, justify="right")
    for name, kind, checkpointing in (
        ("plain", PlainDIVA, False),
        ("clipfix", DIVA, False),
        ("both checkpointed", DIVA, True),
    ):
        peak = alone(peak_gb, kind, args.model, args.generator, args.batch, checkpointing)
        table.add_row(name, f"{peak:.2f}")
    Console().print(table)


def main(words: list[str] | None = None) -> None:
    """Run the benchmarks that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verbs", nargs="+", choices=["step", "batches", "split", "memory"])
    parser.add_argument("--model", default="tiny", help="tiny, or an open_clip architecture such as ViT-L-14")
    parser.add_argument("--generator", choices=GENERATORS, default="tiny")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--batches", type=int, nargs="+", default=[16, 32, 64])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--autocast", action="store_true", help="all rows with trainer.precision=bf16-mixed")
    parser.add_argument("--bf16", action="store_true", help="add a row: weights of the generator in bf16")
    parser.add_argument(
        "--compile", action="store_true", help="add a row: torch.compile, which takes minutes at the start"
    )
    parser.add_argument("--channels-last", action="store_true", help="add a row: the U-Net in channels-last layout")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--ceiling", type=float, help="TFLOP/s of the device; measured by a matrix product if not given"
    )
    parser.add_argument("--profile", action="store_true", help="print the kernels of each row by their time")
    parser.add_argument("--json", help="file for the rows")
    args = parser.parse_args(words)
    results = Results(f"DIVA, {args.model} and {args.generator}, {name_of(args.device)}", args.json)
    for verb in args.verbs:
        if verb in ("split", "memory"):
            {"split": split, "memory": compare_memory}[verb](args)
            continue
        {"step": compare_steps, "batches": compare_batches}[verb](args, results)
        if args.device == "cuda":
            torch.cuda.empty_cache()
    if results.rows:
        results.show()


if __name__ == "__main__":
    main()
