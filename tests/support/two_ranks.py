"""Two ranks of one run, as torchrun and srun start them, forked so that neither imports anything anew."""

import multiprocessing
import os

import torch
from ports import free_port

from clipfix.system import ranks

SLURM = {"SLURM_NTASKS_PER_NODE": "2", "SLURM_NNODES": "1", "SLURM_NODEID": "0", "SLURM_JOB_NAME": "clipfix"}


def started(kind: str, rank: int, port: int, ranks: int = 2) -> dict[str, str]:
    """What a rank finds in its environment; srun's own MASTER_PORT follows from the job's number."""
    if kind == "srun":
        mine = {"SLURM_NTASKS": str(ranks), "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}
        return SLURM | mine | {"SLURM_JOB_ID": str(port), "MASTER_PORT": str(port), "SLURM_NODELIST": "127.0.0.1"}
    world = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank % 2)}
    return world | {"TORCHELASTIC_RUN_ID": "none", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def as_rank(environment: dict[str, str], function, told, *arguments) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    result = function(*arguments)
    if told is not None:
        told.put((ranks.environment().global_rank(), result))


def on_two_ranks(kind: str, function, *arguments, told=None) -> list[int]:
    """The exit codes of two processes that begin where this one stands; what they return goes into a queue."""
    context, port = multiprocessing.get_context("fork"), free_port()
    processes = [
        context.Process(target=as_rank, args=(started(kind, rank, port), function, told, *arguments)) for rank in (0, 1)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    return [process.exitcode for process in processes]
