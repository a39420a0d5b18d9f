"""Where this process stands among others, those that torchrun or srun started, and what all of them must agree on."""

import os
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from typing import Any

PATIENCE = timedelta(minutes=5)  # for ranks that start later; ours


def environment() -> Any:
    """Lightning's view of torchrun or SLURM, in its own order; None of a process that starts all others itself."""
    if "TORCHELASTIC_RUN_ID" not in os.environ and "SLURM_NTASKS" not in os.environ:
        return None  # the usual case waits for no import
    from lightning.fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment

    try:
        return next((kind() for kind in (TorchElasticEnvironment, SLURMEnvironment) if kind.detect()), None)
    except RuntimeError as error:  # what Lightning says of settings of srun that it cannot work with
        raise ValueError(str(error)) from None


def nodes() -> int:
    """Machines of this run, as torchrun or srun was told."""
    if (found := environment()) is None:
        return 1
    here = os.environ.get("LOCAL_WORLD_SIZE")  # torchrun's
    return found.world_size() // int(here) if here else int(os.environ.get("SLURM_NNODES", 1))


def devices() -> int | str:
    """Devices of this machine: one a process that was started on it, else all of them."""
    return "auto" if (found := environment()) is None else found.world_size() // nodes()


def rank_of() -> tuple[int, int]:
    """Which of how many ranks this process is, once they have met."""
    import torch.distributed as dist

    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def check(devices: Any, num_nodes: int) -> None:
    """Raises where the Trainer counts other ranks than there are, or waits for machines that nobody starts."""
    found = environment()
    if found is None:
        if num_nodes > 1 and "NODE_RANK" not in os.environ:  # Lightning's way of starting each machine by hand
            raise ValueError(
                f"trainer.num_nodes={num_nodes}, but nobody starts the other machines: start all by torchrun or srun, "
                "which know how many there are (docs/launch.md)."
            )
    elif isinstance(devices, int) and devices * num_nodes != found.world_size():
        raise ValueError(
            f"trainer.devices={devices} on trainer.num_nodes={num_nodes} are not the {found.world_size()} ranks that "
            "torchrun or srun started: leave both out and set trainer=ddp, which counts them."
        )


def agreed(decide: Callable[[], str]) -> str:
    """What rank 0 decides, on every rank: each composes its own config, and two clocks may name two run folders."""
    found = environment()
    if found is None or found.world_size() == 1:
        return decide()
    place, rank = f"{found.main_address}:{found.main_port}", found.global_rank()
    try:
        met = meeting(place, rank, found.world_size())
        if rank > 0:
            text = met.get("clipfix/agreed").decode()
            met.set(f"clipfix/heard/{rank}", "")
            return text
        met.set("clipfix/agreed", text := decide())
        # Rank 0 may be the one that serves: it stays until all have heard, whatever stops it right after.
        met.wait([f"clipfix/heard/{other}" for other in range(1, found.world_size())])
        return text
    except RuntimeError as error:  # torch.distributed has its own kinds
        raise ValueError(
            f"Rank {rank} of {found.world_size()} did not meet the others at {place} within {PATIENCE}: start all of "
            f"them, and let every host reach that port ({str(error).splitlines()[0]})."
        ) from error


@cache
def meeting(place: str, rank: int, ranks: int) -> Any:
    """The store through which torch.distributed will meet. Kept: on rank 0 it may serve the others."""
    from torch.distributed import rendezvous

    return next(rendezvous(f"tcp://{place}", rank, ranks, timeout=PATIENCE))[0]
