"""Two gloo ranks equal one rank on the joined batch: loss and gradients, for every method in conf/method/."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from small import METHODS, batch, build
from torch.nn.parallel import DistributedDataParallel

from clipfix.methods.base import Method

ROWS, WORLD = 6, 2
CAPTIONS = {"projection_from": "captions", "projection_steps": 2, "patches": "none", "patch_amount": None}
CASES: dict[str, tuple[str, int, dict]] = {  # the method, its optimizer step, and what its yaml does not say
    **{name: (name, 0, {}) for name in METHODS},
    "diva, contrastive": ("diva", 0, {"feedback": "contrastive", "control": "shuffled"}),
    "diva, captions": ("diva", 0, CAPTIONS | {"null_text": "mean", "condition_tokens": 3}),
    "diva, then images": ("diva", 2, CAPTIONS | {"null_text": "mean", "condition_tokens": 3}),
}


def build_case(case: str, clip_folder: str, generator_folder: str) -> Method:
    name, step, settings = CASES[case]
    if settings.get("feedback"):
        settings = settings | {
            "dcr": {"temperature": 0.1, "negatives": 2, "crop_area": [0.5, 0.8], "crop_ratio": [1.0, 1.0]}
        }
    method = build(name, clip_folder, generator_folder, **settings)
    if step:
        torch.nn.init.normal_(method.visual_proj.weight, generator=torch.Generator().manual_seed(0))
        method._trainer = SimpleNamespace(global_step=step)  # what Lightning's global_step reads
    return method


class Step(torch.nn.Module):
    """What DDP wraps: forward is the summed loss."""

    def __init__(self, method: Method):
        super().__init__()
        self.method = method

    def forward(self, inputs: dict) -> torch.Tensor:
        self.method.seed_draws(0)
        return torch.stack(list(self.method.loss(inputs).values())).sum()


def rows(inputs: dict, start: int, stop: int) -> dict:
    """Some images of a batch and all texts of each."""
    each = {key: len(value) // ROWS for key, value in inputs.items() if isinstance(value, list | torch.Tensor)}
    return inputs | {key: inputs[key][start * texts : stop * texts] for key, texts in each.items()}


def gradients(method: Method) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in method.named_parameters() if p.requires_grad}


def worker(rank: int, clip_folder: str, generator_folder: str, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    torch.set_num_threads(1)
    for name in CASES:
        method = build_case(name, clip_folder, generator_folder)
        part = ROWS // WORLD
        step = DistributedDataParallel(Step(method))  # held by a name: its hooks die with it
        loss = step(rows(batch(ROWS), rank * part, (rank + 1) * part))
        loss.backward()
        dist.all_reduce(mean := loss.detach() / WORLD)
        if rank == 0:
            torch.save({"loss": mean, "gradients": gradients(method)}, f"{folder}/{name}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def together(clip_folder, generator_folder, tmp_path_factory):
    """Loss and averaged gradients of each method on two ranks; one pair of processes does them all."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(worker, (clip_folder, generator_folder, str(folder)), nprocs=WORLD)
    return {name: torch.load(folder / f"{name}.pt", weights_only=True) for name in CASES}


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_equal_one(name, together, clip_folder, generator_folder):
    alone = build_case(name, clip_folder, generator_folder)
    loss = Step(alone)(batch(ROWS))
    loss.backward()
    torch.testing.assert_close(together[name]["loss"], loss.detach(), rtol=1e-4, atol=1e-6)
    for key, gradient in gradients(alone).items():
        # Sums of the same numbers in another order: each entry is as exact as the largest of its tensor.
        averaged = together[name]["gradients"][key]
        atol = 1e-5 * float(gradient.abs().max()) + 1e-8
        torch.testing.assert_close(averaged, gradient, rtol=1e-4, atol=atol, msg=lambda m, key=key: f"{key}: {m}")
