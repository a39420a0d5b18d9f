"""One DIVA step against a plain one: VAE in fp32 and text encoder every step, a pass of tower and U-Net for each draw.

    python benchmarks/diva.py step --bf16 --compile         # tiny CLIP and generator: time, operations, agreement
    python benchmarks/diva.py step --generator sd21-small --batch 4 --latents     # Stable Diffusion's proportions
    python benchmarks/diva.py step --model ViT-L-14 --generator sd21-base --batch 16 --autocast --latents --bf16 \
        --compile --checkpoint --repeats 10 --ceiling 989   # on a GPU; 989 TFLOP/s is an H200's in bf16
    python benchmarks/diva.py split                         # which part a step's time goes to
    python benchmarks/diva.py memory --generator sd21-small # what a step needs, with and without checkpointing

Numbers that were measured are in RESULTS.md. Weights are random, but for the tiny models that ship. Each switch of
`step` adds a row with all switches before it.
"""

import argparse
import os
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from hydra.utils import instantiate
from measure import alone, matrix_ceiling
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel

from clipfix import CONF, PACKAGE
from clipfix.backbone import Backbone
from clipfix.diffusion import Diffusion, clip_tokenizer
from clipfix.functional.denoising import denoising_loss
from clipfix.functional.patches import condition_from_tokens
from clipfix.methods.diva import DIVA

GB = 2**30
GENERATORS = ("tiny", "sd21-small", "sd21-base")


class PlainDIVA(DIVA):
    """The same loss as a port of the paper would be written first."""

    def loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        images, diffusion, losses = batch["image"], self.diffusion, []
        rows = len(images)
        with torch.autocast(images.device.type, enabled=False):
            latents = diffusion.encode(images)
        null = diffusion.condition([""] * rows)
        for draw in range(self.draws):
            self.seed_draws(0)  # the patches, noise and timesteps that DIVA draws
            pooled, patches = self.backbone.visual_tokens(images)
            tokens = self.visual_proj(torch.cat([pooled[:, None], self.pick_patches(patches)], dim=1))
            noise = self.draw(torch.randn, rows=rows, shape=(self.draws, *latents.shape[1:]))[:, draw]
            timesteps = self.draw_timesteps(rows)[:, draw]
            noisy = diffusion.add_noise(latents, noise, timesteps)
            predicted = diffusion.predict(noisy, timesteps, condition_from_tokens(tokens, null[0], self.null_text))
            losses.append(denoising_loss(predicted, diffusion.target(latents, noise, timesteps)))
        return {"denoising": torch.stack(losses).mean()}


# -- generators --------------------------------------------------------------------------------------------------------


def sd21(small: bool = False) -> tuple[UNet2DConditionModel, AutoencoderKL, CLIPTextModel]:
    """The parts of Stable Diffusion 2.1-base with random weights; small: all widths an eighth, 256 px instead of 512.

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


@contextmanager
def generator_folder(name: str) -> Iterator[str]:
    """A folder that `Diffusion` loads: the one that ships, or random weights, on disk as long as it is needed."""
    if name == "tiny":
        yield str(PACKAGE / "tiny" / "diffusion")
        return
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        parts = dict(zip(("unet", "vae", "text_encoder"), sd21(small=name == "sd21-small"), strict=True))
        parts["tokenizer"] = clip_tokenizer(77)
        parts["scheduler"] = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
        for part, model in parts.items():
            model.save_pretrained(f"{folder}/{part}")
        yield folder


# -- a step ------------------------------------------------------------------------------------------------------------


def build(kind: type[DIVA], model: str, folder: str, device: str, checkpointing: bool = False, **how: Any) -> DIVA:
    """`how`: settings of the generator. Weights stay where they are, so that every step does the same."""
    torch.manual_seed(0)
    backbone = Backbone(
        str(PACKAGE / "tiny" / "clip") if model == "tiny" else model, None if model == "tiny" else "random"
    )
    config = OmegaConf.load(CONF / "method" / "diva.yaml")
    settings: dict[str, Any] = {"optimizer": {"lr": 0.0}, "checkpointing": checkpointing, "diffusion": None}
    if model == "tiny":  # as in conf/recipe/diva-tiny-scenes.yaml
        settings |= {"patches": "none", "patch_amount": None, "null_text": "mean"}
    config = OmegaConf.merge(config, {"_target_": f"{kind.__module__}.{kind.__qualname__}", **settings})
    diffusion = Diffusion(folder, checkpointing=checkpointing, **how)
    method: DIVA = instantiate(config, backbone=backbone, diffusion=diffusion)
    return method.to(device)


def stepper(method: DIVA, rows: int, autocast: bool, stored: bool = False) -> Callable[[], float]:
    """Forward, backward and update on one batch of noise pictures, their latents stored or not; returns the loss."""
    optimizer = method.configure_optimizers()["optimizer"]
    side, device = method.needs.image_size, method.device.type
    batch = {"image": torch.rand(rows, 3, side, side, generator=torch.Generator().manual_seed(0)).to(device)}
    if stored:  # as run=annotate annotator=latents leaves them
        batch["latents"] = method.diffusion.encode(batch["image"])

    def step() -> float:
        method.seed_draws(0)
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            loss = method.loss(batch)["denoising"]
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def gradient(method: DIVA) -> Tensor:
    return torch.cat([p.grad.flatten().float() for p in method.parameters() if p.grad is not None])


def compare_steps(asked: argparse.Namespace) -> None:
    """A table: plain, DIVA as it is, and DIVA with one more switch a row."""
    device, rows = asked.device, asked.batch
    switches = [
        ("latents", {}),
        ("bf16", {"dtype": "bf16"}),
        ("compile", {"compiled": True}),
        ("checkpoint", {"checkpointing": True}),
    ]
    with generator_folder(asked.generator) as folder:
        how: dict[str, Any] = {}
        methods = {
            "plain": build(PlainDIVA, asked.model, folder, device),
            "clipfix": build(DIVA, asked.model, folder, device),
        }
        for name, setting in switches:
            if getattr(asked, name):
                how |= setting
                methods[f"+ {name}"] = build(DIVA, asked.model, folder, device, **how)
    steps = {
        name: stepper(method, rows, asked.autocast, stored=asked.latents and name.startswith("+"))
        for name, method in methods.items()
    }
    operations, losses, far = {}, {}, {}
    for name, step in steps.items():
        with FlopCounterMode(display=False) as counter, torch.compiler.set_stance("force_eager"):
            step()
        operations[name] = counter.get_total_flops()
        losses[name] = step()  # compiles
        found = gradient(methods[name])
        expected = found if name == "plain" else gradient(methods["plain"])
        far[name] = float((found - expected).norm() / expected.norm())
    del found, expected
    for method in methods.values():
        method.zero_grad()

    wall: dict[str, list[float]] = {name: [] for name in steps}
    cpu: dict[str, list[float]] = {name: [] for name in steps}
    peak = dict.fromkeys(steps, float("nan"))
    for _ in range(asked.repeats):  # in turn, so that a machine that drifts drifts for all
        for name, step in steps.items():
            if device == "cuda":
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                others = torch.cuda.memory_allocated() - held(methods[name])
            start, start_cpu = time.perf_counter(), time.process_time()
            step()  # ends with .item(), which waits for the device
            wall[name].append(time.perf_counter() - start)
            cpu[name].append(time.process_time() - start_cpu)
            if device == "cuda":
                peak[name] = (torch.cuda.max_memory_allocated() - others) / GB
    dtype = torch.bfloat16 if asked.autocast else torch.float32
    ceiling = asked.ceiling * 1e12 if asked.ceiling else matrix_ceiling(device, dtype)
    table = Table(
        title=f"{asked.model} and {asked.generator}, batch {rows}, {methods['plain'].draws} draws, {device}, "
        f"{torch.get_num_threads()} threads, ceiling {ceiling / 1e12:.2f} TFLOP/s"
    )
    columns = (
        "",
        "s a step",
        "images/s",
        "CPU s",
        "speed",
        "TFLOP/image",
        "of ceiling",
        "peak GB",
        "loss",
        "gradient off",
    )
    for column in columns:
        table.add_column(column, justify="right")
    clock = wall if device == "cuda" else cpu  # other work on a machine stretches wall time, and CPU time less
    for name in steps:
        seconds = median(wall[name])
        table.add_row(
            name,
            f"{seconds:.3f} ({min(wall[name]):.3f} to {max(wall[name]):.3f})",
            f"{rows / seconds:.2f}",
            f"{median(cpu[name]):.3f}",
            f"{median(a / b for a, b in zip(clock['plain'], clock[name], strict=True)):.2f}",
            f"{operations[name] / rows / 1e12:.4f}",
            f"{100 * operations[name] / seconds / ceiling:.0f} %",
            f"{peak[name]:.1f}",
            f"{losses[name]:.6f}",
            f"{far[name]:.1e}",
        )
    console = Console(width=160)
    console.print(table)
    console.print(f"Speed is against plain, by {'wall' if clock is wall else 'CPU'} time, the median over the repeats.")


def held(method: DIVA) -> int:
    """Bytes of a model's weights."""
    return sum(tensor.nbytes for tensor in [*method.parameters(), *method.buffers()])


# -- where the time and the memory go ----------------------------------------------------------------------------------


def split(asked: argparse.Namespace) -> None:
    """CPU or device seconds of each part for one batch; the last row is what a frozen U-Net saves."""
    device, rows = asked.device, asked.batch
    with generator_folder(asked.generator) as folder:
        method = build(DIVA, asked.model, folder, device, dtype="bf16" if asked.bf16 else "fp32")
    diffusion, side = method.diffusion, method.needs.image_size
    images = torch.rand(rows, 3, side, side, device=device)
    count = rows * method.draws
    latents = torch.randn(count, *diffusion.encode(images[:1]).shape[1:], device=device)
    timesteps = torch.randint(0, 1000, (count,), device=device)
    method.seed_draws(0)
    with torch.no_grad():
        condition = method.condition(*method.backbone.visual_tokens(images))
    condition = condition.repeat_interleave(method.draws, dim=0)

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
    table = Table(title=f"{asked.model} and {asked.generator}, {rows} images, {count} draws, {device}")
    for column in ("", "s"):
        table.add_column(column, justify="right")
    for name, part in parts.items():
        seconds = []
        for _ in range(1 + asked.repeats):
            clock = time.perf_counter if device == "cuda" else time.process_time
            start = clock()
            part()
            if device == "cuda":
                torch.cuda.synchronize()
            seconds.append(clock() - start)
        table.add_row(name, f"{median(seconds[1:]):.4f}")  # the first one warms up
    Console(width=120).print(table)


def peak_gb(kind: type[DIVA], model: str, folder: str, rows: int, checkpointing: bool) -> float:
    """What one step adds to the resident set of a process that holds the models."""
    step = stepper(build(kind, model, folder, "cpu", checkpointing=checkpointing), rows, autocast=False)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / GB


def compare_memory(asked: argparse.Namespace) -> None:
    # Else glibc keeps freed pieces for itself.
    os.environ |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    table = Table(title=f"Peak memory of a step, {asked.model} and {asked.generator}, {asked.batch} images")
    for column in ("", "GB"):
        table.add_column(column, justify="right")
    with generator_folder(asked.generator) as folder:
        for name, kind, checkpointing in (
            ("plain", PlainDIVA, False),
            ("clipfix", DIVA, False),
            ("both checkpointed", DIVA, True),
        ):
            peak = alone(peak_gb, kind, asked.model, folder, asked.batch, checkpointing)
            table.add_row(name, f"{peak:.2f}")
    Console().print(table)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=["step", "split", "memory"])
    parser.add_argument("--model", default="tiny", help="tiny, or an open_clip architecture such as ViT-L-14")
    parser.add_argument("--generator", choices=GENERATORS, default="tiny")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--autocast", action="store_true", help="every row in bf16-mixed, as trainer.precision has it")
    parser.add_argument("--latents", action="store_true", help="a row more: latents computed before, and stored")
    parser.add_argument("--bf16", action="store_true", help="a row more: the generator's weights in bf16")
    parser.add_argument("--compile", action="store_true", help="a row more: torch.compile, minutes at the start")
    parser.add_argument("--checkpoint", action="store_true", help="a row more: both models checkpointed")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--ceiling", type=float, help="TFLOP/s of the device; without it, of one matrix product")
    asked = parser.parse_args()
    {"step": compare_steps, "split": split, "memory": compare_memory}[asked.verb](asked)
