"""The rank of this process among those that torchrun or srun started, and values that all ranks must share."""

import os
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from typing import Any

PATIENCE = timedelta(minutes=5)  # wait for ranks that start later; our choice


def environment() -> Any:
    """Return Lightning's environment of torchrun or SLURM; None if this process starts the other ranks itself.

    Raises:
        ValueError: if Lightning refuses the settings of srun.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ and "SLURM_NTASKS" not in os.environ:
        return None  # without the slow import in the usual case
    from lightning.fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment

    try:
        return next((kind() for kind in (TorchElasticEnvironment, SLURMEnvironment) if kind.detect()), None)
    except RuntimeError as error:  # Lightning raises this for settings of srun that it does not support
        raise ValueError(str(error)) from None


def nodes() -> int:
    """Return the number of machines that torchrun or srun started; 1 without them."""
    if (cluster := environment()) is None:
        return 1
    here = os.environ.get("LOCAL_WORLD_SIZE")  # set by torchrun
    return cluster.world_size() // int(here) if here else int(os.environ.get("SLURM_NNODES", 1))


def devices() -> int | str:
    """Return the number of devices to use on this machine: one for each process started on it, or "auto" for all."""
    return "auto" if (cluster := environment()) is None else cluster.world_size() // nodes()


def rank_of() -> tuple[int, int]:
    """Return (rank, number of ranks) of this process; (0, 1) before torch.distributed is initialized."""
    import torch.distributed as dist

    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def check(devices: Any, num_nodes: int) -> None:
    """Check the number of ranks.

    Args:
        devices: `trainer.devices`.
        num_nodes: `trainer.num_nodes`.

    Raises:
        ValueError: if these do not give the number of started ranks, or other machines were not started.
    """
    cluster = environment()
    if cluster is None:
        if num_nodes > 1 and "NODE_RANK" not in os.environ:  # Lightning reads it if each machine is started by hand
            raise ValueError(
                f"trainer.num_nodes is {num_nodes}, but only this process was started: start all machines by torchrun "
                "or srun (docs/launch.md)."
            )
    elif isinstance(devices, int) and devices * num_nodes != cluster.world_size():
        raise ValueError(
            f"trainer.devices={devices} on trainer.num_nodes={num_nodes} are not the {cluster.world_size()} ranks that "
            "torchrun or srun started: leave both out and set trainer=ddp, which counts them."
        )


def agreed(decide: Callable[[], str]) -> str:
    """Return on every rank what `decide` returns on rank 0.

    Each rank composes its own config, and their clocks could give different run folders.

    Raises:
        ValueError: if ranks are missing.
    """
    cluster = environment()
    if cluster is None or cluster.world_size() == 1:
        return decide()
    place, rank = f"{cluster.main_address}:{cluster.main_port}", cluster.global_rank()
    try:
        store = meeting(place, rank, cluster.world_size())
        if rank > 0:
            text = store.get("clipfix/agreed").decode()
            store.set(f"clipfix/heard/{rank}", "")
            return text
        store.set("clipfix/agreed", text := decide())
        # Rank 0 may serve the store, so it waits until all others have read, in case an error ends it right after.
        store.wait([f"clipfix/heard/{other}" for other in range(1, cluster.world_size())])
        return text
    except RuntimeError as error:  # the base class of the errors of torch.distributed
        raise ValueError(
            f"Rank {rank} of {cluster.world_size()} did not meet the others at {place} within {PATIENCE}: start all of "
            f"them, and let every host reach that port ({str(error).splitlines()[0]})."
        ) from error


@cache
def meeting(place: str, rank: int, ranks: int) -> Any:
    """Return the store by which torch.distributed connects the ranks. It is cached, as rank 0 may serve it."""
    from torch.distributed import rendezvous

    return next(rendezvous(f"tcp://{place}", rank, ranks, timeout=PATIENCE))[0]
