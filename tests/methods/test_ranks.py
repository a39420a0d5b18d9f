"""Two and four gloo ranks equal one on the joined batch, in fp64: loss and gradients, for every method in conf/method/.

Two batches are accumulated, as with trainer.accumulate_grad_batches=2. Batches of training are never uneven: the stream
of each rank has no end (tests/test_data.py).
"""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from small import METHODS, batch, build
from torch.nn.parallel import DistributedDataParallel

from clipfix import diffusion
from clipfix.methods.base import Method

ROWS, BATCHES = 8, 2
WORLDS = (1, 2, 4)
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
    return method.double()


class Step(torch.nn.Module):
    """What DDP wraps: forward is the summed loss."""

    def __init__(self, method: Method):
        super().__init__()
        self.method = method

    def forward(self, inputs: dict, number: int) -> torch.Tensor:
        self.method.seed_draws(number)
        return torch.stack(list(self.method.loss(inputs).values())).sum()


def rows(inputs: dict, start: int, stop: int) -> dict:
    """Some images of a batch and all texts of each."""
    each = {key: len(value) // ROWS for key, value in inputs.items() if isinstance(value, list | torch.Tensor)}
    part = {key: inputs[key][start * texts : stop * texts] for key, texts in each.items()}
    return inputs | part | {"image": part["image"].double()}


def gradients(method: Method) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in method.named_parameters() if p.requires_grad}


def accumulated(method: Method, rank: int, ranks: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients of two batches, of which this rank has its part; without find_unused_parameters."""
    step = Step(method)
    wrapped = DistributedDataParallel(step) if ranks > 1 else step
    part, losses = ROWS // ranks, []
    for number in range(BATCHES):
        last = number == BATCHES - 1
        with nullcontext() if last or ranks == 1 else wrapped.no_sync():
            loss = wrapped(rows(batch(ROWS, seed=number), rank * part, (rank + 1) * part), number)
            loss.backward()
        losses.append(loss.detach())
    total = torch.stack(losses).sum() / ranks
    if ranks > 1:
        dist.all_reduce(total)
    return total, gradients(method)


def worker(rank: int, clip_folder: str, generator_folder: str, folder: str) -> None:
    # What methods compute in fp32 is computed in fp64 here, where the order of a sum shows in the last digits alone.
    torch.Tensor.float = torch.Tensor.double
    diffusion.DTYPES["fp32"] = torch.float64
    torch.set_num_threads(1)
    for ranks in WORLDS:
        if rank >= ranks:
            continue
        if ranks > 1:
            store = f"file://{folder}/store{ranks}"
            dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks)
        for name in CASES:
            loss, found = accumulated(build_case(name, clip_folder, generator_folder), rank, ranks)
            if rank == 0:
                torch.save({"loss": loss, "gradients": found}, f"{folder}/{name}-{ranks}.pt")
        if ranks > 1:
            dist.destroy_process_group()


@pytest.fixture(scope="module")
def together(clip_folder, generator_folder, tmp_path_factory):
    """(case, ranks) -> loss and gradients; four processes do them all."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(worker, (clip_folder, generator_folder, str(folder)), nprocs=max(WORLDS))
    return lambda name, ranks: torch.load(folder / f"{name}-{ranks}.pt", weights_only=True)


@pytest.mark.parametrize("ranks", WORLDS[1:])
@pytest.mark.parametrize("name", CASES)
def test_ranks_equal_one(name, ranks, together):
    alone, shared = together(name, 1), together(name, ranks)
    assert alone["loss"].dtype == torch.float64
    torch.testing.assert_close(shared["loss"], alone["loss"], rtol=1e-6, atol=0)
    assert shared["gradients"].keys() == alone["gradients"].keys()
    for key, gradient in alone["gradients"].items():
        if gradient is None:
            assert shared["gradients"][key] is None, key
            continue
        assert gradient.dtype == torch.float64
        # Sums of the same numbers in another order: each entry is as exact as the largest of its tensor.
        atol = 1e-6 * float(gradient.abs().max()) + 1e-15
        found = shared["gradients"][key]
        torch.testing.assert_close(found, gradient, rtol=0, atol=atol, msg=lambda m, key=key: f"{key}: {m}")
