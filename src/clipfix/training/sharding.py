"""FSDP2: trained weights are sharded over the ranks and gathered block by block during the forward and backward pass.

Frozen weights stay replicated on every rank. They have no gradient and no moments, which are most of the memory of a
trained weight, and gathering a frozen generator in every step would cost more time than it saves memory. Scalars cannot
be sharded. They are replicated DTensors, so that optimizers, norms and clipping meet one kind of tensor.
"""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

# Methods that run in place of a module's forward, so FSDP must gather the weights for them as well.
FORWARD_METHODS = ("packed",)

# -- modules -----------------------------------------------------------------------------------------------------------


def shard(module: nn.Module, mesh: DeviceMesh) -> None:
    """Shard the trained weights of a module over the ranks: each block on its own, the other weights with the module.

    Weights outside of blocks are gathered from the start of the module's forward to its end, and again in the backward
    pass.

    Args:
        mesh: all ranks, in any shape.

    Raises:
        ValueError: if a module with trained weights is compiled.
    """
    compiled = [part for part in module.modules() if getattr(part, "_compiled_call_impl", None)]
    if any(_splits(weight) for part in compiled for weight in part.parameters()):
        raise ValueError(
            "trainer=fsdp cannot gather the weights of a compiled model: set method.compiled=false and "
            "backbone.compiled=false, or choose trainer=ddp."
        )
    ranks = init_device_mesh(mesh.device_type, (mesh.size(),))
    for owner in module.modules():
        for name, weight in list(owner.named_parameters(recurse=False)):
            if weight.requires_grad and weight.ndim == 0:
                copies = distribute_tensor(weight.detach(), ranks, [Replicate()], src_data_rank=None)
                owner.register_parameter(name, nn.Parameter(copies))
    frozen = {weight for weight in module.parameters() if not _splits(weight)}
    lists = list(_block_lists(module))
    for part in [*itertools.chain.from_iterable(lists), module]:
        # By default torch would keep the root gathered after its forward; code that reads weights expects shards.
        fully_shard(part, mesh=ranks, reshard_after_forward=True, ignored_params=frozen)
        for name in FORWARD_METHODS:
            if hasattr(part, name):
                register_fsdp_forward_method(part, name)
    # By default a backward pass gathers ahead in the order of all forward passes since the last one. Ranks that ran
    # different passes in between, in validation or for pictures, would then wait for each other forever.
    for blocks in lists:
        for block, ahead in zip(blocks, [module, *blocks], strict=False):
            block.set_modules_to_backward_prefetch([ahead])
    root: Any = module
    root.run_nothing = lambda: None
    register_fsdp_forward_method(module, "run_nothing")


def _block_lists(module: nn.Module) -> Iterator[list[Any]]:
    """Yield the trained members of each outermost list of modules: blocks of a transformer, stages of a U-Net."""
    for child in module.children():
        if isinstance(child, nn.ModuleList | nn.Sequential):
            yield [block for block in child if any(map(_splits, block.parameters()))]
        else:
            yield from _block_lists(child)


def _splits(weight: Tensor) -> bool:
    return weight.requires_grad and weight.ndim > 0


def unshard(module: nn.Module) -> None:
    """Gather all weights on every rank, so that each rank can run the module alone. All ranks must call this."""
    if isinstance(module, FSDPModule):
        # The module whose forward runs first becomes the root of FSDP. Without this it could be a block.
        root: Any = module
        root.run_nothing()
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.set_reshard_after_forward(False, recurse=False)
            part.unshard()


def reshard(module: nn.Module) -> None:
    """Undo `unshard`. Changes that were made to the gathered weights are lost."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.set_reshard_after_forward(True, recurse=False)
            part.reshard()


@contextmanager
def unsharded(module: nn.Module) -> Iterator[None]:
    """Gather all weights within the block."""
    unshard(module)
    try:
        yield
    finally:
        reshard(module)


# -- tensors: each function returns a tensor that is not sharded unchanged ---------------------------------------------


def shared(scalar: Tensor) -> Tensor:
    """Return a replicated scalar as an ordinary tensor. Its gradient is the mean over ranks, as with DDP."""
    if not isinstance(scalar, DTensor):
        return scalar
    return Shared.apply(scalar) if torch.is_grad_enabled() else scalar.to_local()


class Shared(torch.autograd.Function):
    """Averages the gradient by a sum and a division, because gloo has no mean, which DTensor's own method uses."""

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


def full_tensor(tensor: Tensor) -> Tensor:
    """Return the full tensor in main memory on the first rank, and zeros that take no memory on the others.

    All ranks must call this.
    """
    if not isinstance(tensor, DTensor):
        return tensor
    with torch.no_grad():
        full = tensor.full_tensor()
    if dist.get_rank() == 0:
        return full.cpu()
    return torch.zeros((), dtype=full.dtype).expand(full.shape)


def like(tensor: Tensor, other: Tensor) -> Tensor:
    """Return a full tensor, which is the same on every rank, in the dtype, device and sharding of `other`.

    Both have the same shape.
    """
    if isinstance(other, DTensor):
        return distribute_tensor(tensor.to(other.dtype), other.device_mesh, other.placements, src_data_rank=None)
    return tensor.to(other)


def local(tensor: Tensor) -> Tensor:
    """Return the shard of this rank; it shares memory with `tensor`."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def rows_here(table: Tensor) -> slice:
    """Return which rows of a table, sharded along its first dimension, this rank holds."""
    if not isinstance(table, DTensor):
        return slice(0, len(table))
    each = -(-len(table) // table.device_mesh.size())
    first = each * table.device_mesh.get_local_rank()
    return slice(first, first + each)
