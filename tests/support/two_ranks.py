"""Two ranks of one run, as torchrun and srun start them. They are forked, which saves imports."""

import multiprocessing
import os

import torch
from ports import free_port

from clipfix.system import ranks

SLURM = {"SLURM_NTASKS_PER_NODE": "2", "SLURM_NNODES": "1", "SLURM_NODEID": "0", "SLURM_JOB_NAME": "clipfix"}


def started(kind: str, rank: int, port: int, ranks: int = 2) -> dict[str, str]:
    """Return the environment variables of a rank. srun derives MASTER_PORT from the number of the job."""
    if kind == "srun":
        mine = {"SLURM_NTASKS": str(ranks), "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}
        return SLURM | mine | {"SLURM_JOB_ID": str(port), "MASTER_PORT": str(port), "SLURM_NODELIST": "127.0.0.1"}
    world = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank % 2)}
    return world | {"TORCHELASTIC_RUN_ID": "none", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def as_rank(environment: dict[str, str], function, results, *arguments) -> None:
    """Call a function as a rank, and put (rank, result) into a queue."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    result = function(*arguments)
    if results is not None:
        results.put((ranks.environment().global_rank(), result))


def on_two_ranks(kind: str, function, *arguments, results=None) -> list[int]:
    """Call a function on two forked ranks, and return their exit codes.

    Args:
        results: queue for what the function returns.
    """
    context, port = multiprocessing.get_context("fork"), free_port()
    processes = [
        context.Process(target=as_rank, args=(started(kind, rank, port), function, results, *arguments))
        for rank in (0, 1)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    return [process.exitcode for process in processes]
