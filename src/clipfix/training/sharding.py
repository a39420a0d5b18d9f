"""FSDP2: what trains is split over the ranks, and gathered block by block while it computes.

Frozen weights stay whole on every rank: they have no gradient and no moments, which are most of what a trained one
costs, and gathering a frozen generator in every step would cost more time than it saves memory. Scalars cannot be
split; they are replicated, like the rest as DTensors, so that an optimizer, a norm or a clip meets one kind alone.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

# Methods that run in the place of a module's forward, so that its weights must be gathered for them as well.
FORWARD_METHODS = ("packed",)

# -- modules -----------------------------------------------------------------------------------------------------------


def shard(module: nn.Module, mesh: DeviceMesh) -> None:
    """Splits the trained weights over a mesh of one dimension: each block by itself, the rest with the module.

    Weights outside of blocks are whole from the module's forward to its end, and again in the backward pass.
    """
    compiled = [part for part in module.modules() if getattr(part, "_compiled_call_impl", None)]
    if any(_splits(weight) for part in compiled for weight in part.parameters()):
        raise ValueError(
            "trainer=fsdp gathers weights as a model runs, which a compiled one does not see: set "
            "method.compiled=false and backbone.compiled=false, or choose trainer=ddp."
        )
    for owner in module.modules():
        for name, weight in list(owner.named_parameters(recurse=False)):
            if weight.requires_grad and weight.ndim == 0:
                copies = distribute_tensor(weight.detach(), mesh, [Replicate()], src_data_rank=None)
                owner.register_parameter(name, nn.Parameter(copies))
    whole = {weight for weight in module.parameters() if not _splits(weight)}
    for part in [*_blocks(module), module]:
        # The outermost too, which torch would leave whole behind a forward: who reads weights then finds them split.
        fully_shard(part, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
        for name in FORWARD_METHODS:
            if hasattr(part, name):
                register_fsdp_forward_method(part, name)


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The members of the outermost lists of modules, where they train: blocks of a transformer, stages of a U-Net."""
    for child in module.children():
        if isinstance(child, nn.ModuleList | nn.Sequential):
            yield from (block for block in child if any(map(_splits, block.parameters())))
        else:
            yield from _blocks(child)


def _splits(weight: Tensor) -> bool:
    return weight.requires_grad and weight.ndim > 0


def unshard(module: nn.Module) -> None:
    """From here on every rank has all weights, and may run the module alone, as often as it likes; for all ranks."""
    if isinstance(module, FSDPModule):
        # Else the block that runs first would take itself for the outermost module.
        fully_shard.state(module)._lazy_init()  # type: ignore[attr-defined]
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.set_reshard_after_forward(False, recurse=False)
            part.unshard()


def reshard(module: nn.Module) -> None:
    """Takes `unshard` back. What was changed in between is lost.

    What ran in between is forgotten: torch gathers ahead, in a backward pass, in the order of all forward passes since
    the last, and where one rank has had others than the rest they would wait for each other for ever.
    """
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.set_reshard_after_forward(True, recurse=False)
            part.reshard()
            state = fully_shard.state(part)  # type: ignore[attr-defined]
            state._comm_ctx.post_forward_order.clear()
            if state._fsdp_param_group is not None:
                state._fsdp_param_group._post_forward_indices.clear()


@contextmanager
def unsharded(module: nn.Module) -> Iterator[None]:
    unshard(module)
    try:
        yield
    finally:
        reshard(module)


# -- tensors: each function takes what is not sharded as it is ---------------------------------------------------------


def shared(scalar: Tensor) -> Tensor:
    """A replicated scalar as an ordinary one, to compute with; its gradient is the mean over ranks, as with DDP."""
    if not isinstance(scalar, DTensor):
        return scalar
    return Shared.apply(scalar) if torch.is_grad_enabled() else scalar.to_local()


class Shared(torch.autograd.Function):
    """DTensor's own redistribution would ask gloo for a mean, which it has not."""

    @staticmethod
    def forward(ctx: Any, scalar: DTensor) -> Tensor:
        ctx.mesh = scalar.device_mesh
        local = scalar.to_local()
        return local.view_as(local)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> DTensor:
        gradient = gradient / ctx.mesh.size()
        dist.all_reduce(gradient, group=ctx.mesh.get_group())
        return DTensor.from_local(gradient, ctx.mesh, [Replicate()], run_check=False)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor in main memory, for the first rank; others, who take part, get zeros that take no memory."""
    if not isinstance(tensor, DTensor):
        return tensor
    with torch.no_grad():
        found = tensor.full_tensor()
    if dist.get_rank() == 0:
        return found.cpu()
    return torch.zeros((), dtype=found.dtype).expand(found.shape)


def like(tensor: Tensor, other: Tensor) -> Tensor:
    """A whole tensor, the same on every rank, in the type and layout of another of its shape."""
    if isinstance(other, DTensor):
        return distribute_tensor(tensor.to(other.dtype), other.device_mesh, other.placements, src_data_rank=None)
    return tensor.to(other)


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of it, sharing memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def rows_here(table: Tensor) -> slice:
    """Which rows of it this rank holds."""
    if not isinstance(table, DTensor):
        return slice(0, len(table))
    each = -(-len(table) // table.device_mesh.size())
    first = each * table.device_mesh.get_local_rank()
    return slice(first, first + each)
