"""Two and four gloo ranks equal one on the joined batch, in fp64, by DDP and FSDP2, for every method in conf/method/.

Loss, gradients and weights. Two batches are accumulated, as with trainer.accumulate_grad_batches=2. Batches of training
are never uneven: the stream of each rank has no end (tests/test_stream.py). With a Trainer: test_fsdp.py.
"""

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from small import METHODS, batch, build
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from clipfix.methods.base import Method
from clipfix.models import diffusion

ROWS, BATCHES, STEPS = 8, 2, 2
TWO = ((2, "ddp"), (2, "fsdp"))
OPTIMIZER = {"name": "AdamW", "lr": 1e-2, "weight_decay": 0.1}
CAPTIONS = {"steps": 2, "tokens": 3}
CASES: dict[str, tuple[str, int, tuple[str, ...], dict]] = {  # the method, its optimizer step, parts and settings
    **{name: (name, 0, (), {}) for name in METHODS},
    "diva, contrastive": (
        "diva", 0, ("feedback=contrastive",),
        {"shuffled": True, "feedback": {"negatives": 2, "crop_area": [0.5, 0.8], "crop_ratio": [1.0, 1.0]}},
    ),
    "diva, captions": ("diva", 0, ("condition=caption_space",), {"condition": CAPTIONS}),
    "diva, then images": ("diva", 2, ("condition=caption_space",), {"condition": CAPTIONS}),
}  # fmt: skip


# Name, ranks and kind. More ranks than two show nothing of one loss that they do not show of another.
RUNS = [(name, *world) for name in CASES for world in TWO] + [("diva, contrastive", 4, "ddp")]
SLOW = [run for name in CASES if (run := (name, 4, "ddp")) not in RUNS]


def build_case(case: str, clip_folder: str, generator_folder: str) -> Method:
    name, step, groups, settings = CASES[case]
    method = build(name, clip_folder, generator_folder, *groups, optimizer=OPTIMIZER, **settings)
    if step:
        torch.nn.init.normal_(method.condition.projection.weight, generator=torch.Generator().manual_seed(0))
        method._trainer = SimpleNamespace(global_step=step)  # what Lightning's global_step reads
    return method.double()


class Step(torch.nn.Module):
    """What DDP wraps: forward is the summed loss."""

    def __init__(self, method: Method):
        super().__init__()
        self.method = method

    def forward(self, inputs: dict, number: int) -> torch.Tensor:
        self.method.seed_draws(number)
        return torch.stack(list(self.method.terms(inputs).values())).sum()


def rows(inputs: dict, start: int, stop: int) -> dict:
    """Some images of a batch and all texts of each."""
    each = {key: len(value) // ROWS for key, value in inputs.items() if isinstance(value, list | torch.Tensor)}
    part = {key: inputs[key][start * texts : stop * texts] for key, texts in each.items()}
    return inputs | part | {"image": part["image"].double()}


def gradients(method: Method) -> dict[str, torch.Tensor | None]:
    return {name: complete(p.grad) for name, p in method.named_parameters() if p.requires_grad}


def complete(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """A copy: clipping scales gradients in place."""
    return tensor.full_tensor().clone() if isinstance(tensor, DTensor) else tensor if tensor is None else tensor.clone()


def accumulated(method: Method, rank: int, ranks: int, sharded: bool) -> dict[str, Any]:
    """Loss and gradients of two batches, of which this rank has its part; without find_unused_parameters.

    And how far the weights move in two such steps, with clipped gradients and weight decay.
    """
    if sharded:
        method._device_mesh = init_device_mesh("cpu", (ranks, 1), mesh_dim_names=("data_parallel", "tensor_parallel"))
        method.configure_model()
    step = Step(method)
    wrapped = DistributedDataParallel(step) if ranks > 1 and not sharded else step
    optimizer = method.configure_optimizers()["optimizer"]
    before = {name: complete(p.detach()) for name, p in method.named_parameters() if p.requires_grad}
    part, losses, first = ROWS // ranks, [], {}
    for number in range(STEPS * BATCHES):
        last = number % BATCHES == BATCHES - 1
        with nullcontext() if last or wrapped is step else wrapped.no_sync():
            loss = wrapped(rows(batch(ROWS, seed=number), rank * part, (rank + 1) * part), number)
            loss.backward()
        losses.append(loss.detach())
        if last:
            first = first or gradients(method)
            method.on_before_optimizer_step(optimizer)
            torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 0.1)
            optimizer.step()
            optimizer.zero_grad()
            method.on_train_batch_end()
    total = torch.stack(losses).sum() / ranks
    if ranks > 1:
        dist.all_reduce(total)
    after = {name: complete(p.detach()) for name, p in method.named_parameters() if p.requires_grad}
    return {"loss": total, "gradients": first, "moved": {name: after[name] - before[name] for name in before}}


def worker(rank: int, clip_folder: str, generator_folder: str, folder: str, runs: list[tuple[str, int, str]]) -> None:
    # What methods compute in fp32 is computed in fp64 here, where the order of a sum shows in the last digits alone.
    torch.Tensor.float = torch.Tensor.double
    diffusion.DTYPES["fp32"] = torch.float64
    torch.set_num_threads(1)
    alone = [(name, 1, "one") for name in dict.fromkeys(name for name, *_ in runs)]
    for ranks in (1, 2, 4):
        mine = [run for run in (*alone, *runs) if run[1] == ranks]
        if rank >= ranks or not mine:
            continue
        if ranks > 1:
            store = f"file://{folder}/store{ranks}"
            dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks)
        for name, _, kind in mine:
            method = build_case(name, clip_folder, generator_folder)
            found = accumulated(method, rank, ranks, sharded=kind == "fsdp")
            if rank == 0:
                torch.save(found, f"{folder}/{name}-{ranks}-{kind}.pt")
        if ranks > 1:
            dist.destroy_process_group()


@pytest.fixture(scope="module")
def together(request, clip_folder, generator_folder, tmp_path_factory):
    """(case, ranks, kind) -> loss, gradients and movements of one rank and of several.

    Four processes do all that the chosen tests ask for, forked so that they import nothing.
    """
    folder = tmp_path_factory.mktemp("ranks")
    asked = [item.callspec.params for item in request.session.items if item.path == request.path]
    runs = [(params["name"], params["ranks"], params["kind"]) for params in asked]
    arguments = (clip_folder, generator_folder, str(folder), runs)
    mp.start_processes(worker, arguments, nprocs=4, start_method="fork")

    def found(name: str, ranks: int, kind: str) -> list[dict[str, Any]]:
        files = (f"{name}-1-one.pt", f"{name}-{ranks}-{kind}.pt")
        return [torch.load(folder / file, weights_only=True) for file in files]

    return found


@pytest.mark.parametrize(
    ("name", "ranks", "kind"), [*RUNS, *(pytest.param(*run, marks=pytest.mark.slow) for run in SLOW)]
)
def test_ranks_equal_one(name, ranks, kind, together):
    alone, shared = together(name, ranks, kind)
    assert alone["loss"].dtype == torch.float64
    torch.testing.assert_close(shared["loss"], alone["loss"], rtol=1e-6, atol=0)
    for what in ("gradients", "moved"):
        assert shared[what].keys() == alone[what].keys()
        for key, expected in alone[what].items():
            found = shared[what][key]
            if expected is None or found is None:  # DDP hands in zeros for what rests, FSDP2 nothing
                assert all(value is None or (kind == "fsdp" and not value.any()) for value in (expected, found)), key
                continue
            assert expected.dtype == torch.float64
            # Sums of the same numbers in another order: each entry is as exact as the largest of its tensor. Where that
            # is nothing but rounding, Adam still moves a weight by some share of the rate.
            atol = 1e-6 * (float(expected.abs().max()) + 1e-9 if what == "gradients" else OPTIMIZER["lr"])
            name = f"{what} of {key}"
            torch.testing.assert_close(found, expected, rtol=0, atol=atol, msg=lambda m, name=name: f"{name}: {m}")
