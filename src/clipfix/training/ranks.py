"""The joined batch of all ranks: gathers rows with gradients, and draws random numbers for any number of ranks.

In training the rows of all ranks form one joined batch, so that any number of ranks computes the same loss. In
validation, where the last batches of ranks may differ in length, each rank uses its own rows alone.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from clipfix.system.ranks import rank_of


class Ranks(nn.Module):
    """The position of this rank in the joined batch, and a random generator with the same seed on all ranks.

    It is a module without parameters, so that `train()` and `eval()` of the method apply to it too: in eval mode there
    is one rank. A method and its parts share one instance.

    Args:
        seed: seed of the run. The draws of batch n depend on (seed, n) alone, so a resumed run repeats them.
    """

    generator: torch.Generator

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed

    @property
    def size(self) -> int:
        """Number of ranks that share a batch."""
        return rank_of()[1] if self.training else 1

    @property
    def rank(self) -> int:
        """Index of this rank among those that share a batch."""
        return rank_of()[0] if self.training else 0

    def reseed(self, batch_number: int, device: torch.device) -> None:
        """Seed the random draws of a batch."""
        state = np.random.SeedSequence([self.seed % 2**63, batch_number]).generate_state(1, np.uint64)
        self.generator = torch.Generator(device).manual_seed(int(state[0] >> 1))

    def sample(self, sampler: Callable[..., Tensor], *args: Any, rows: int, shape: tuple[int, ...] = ()) -> Tensor:
        """Return this rank's part, [rows, *shape], of `sampler(*args, (rows of all ranks, *shape))`.

        Several ranks together get the draws that one rank would get for the joined batch.
        """
        device = self.generator.device
        joined = sampler(*args, (rows * self.size, *shape), generator=self.generator, device=device)
        return joined[rows * self.rank : rows * (self.rank + 1)]

    def gather(self, rows: Tensor) -> Tensor:
        """Return the rows of all ranks, [b * size, ...], in order of rank. Gradients flow back to each rank."""
        return Gather.apply(rows) if self.size > 1 else rows


class Gather(torch.autograd.Function):
    """all_gather whose backward pass sums the gradients of these rows over the losses of all ranks. DDP averages them.

    torch has such a function too, but has renamed and deprecated it twice since 2.6.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        gathered = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, rows.contiguous())
        return torch.cat(gathered)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]
