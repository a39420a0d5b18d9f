"""Distributions of the timesteps at which the feedback of a diffusion model is computed."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from clipfix.functional.denoising import logit_normal_timesteps
from clipfix.training.ranks import Ranks


class Timesteps(ABC):
    """A distribution of timesteps.

    Args:
        draws: number of draws of noise and timestep for each image.
        range: [low, high), the timesteps to draw from; None for all timesteps of the model.
    """

    def __init__(self, draws: int, range: Sequence[int] | None) -> None:
        if draws < 1:
            raise ValueError(f"method.timesteps.draws is {draws}: set it to 1 or more.")
        self.draws, self.range = draws, None if range is None else (int(range[0]), int(range[1]))

    def bounds(self, num_timesteps: int) -> tuple[int, int]:
        """Return [low, high) for a diffusion model; raise ValueError if they are not among its timesteps."""
        low, high = self.range or (0, num_timesteps)
        if not 0 <= low < high <= num_timesteps:
            raise ValueError(
                f"method.timesteps.range is [{low}, {high}]: give its first timestep and the one after its last, "
                f"between 0 and the diffusion model's {num_timesteps}."
            )
        return low, high

    @abstractmethod
    def sample(self, rows: int, num_timesteps: int, ranks: Ranks) -> Int[Tensor, "b k"]:
        """Return `draws` timesteps for each of this rank's images."""


class Uniform(Timesteps):
    """Every timestep of the range is equally likely. Source: DIVA (arXiv 2407.20171), the authors' code."""

    def sample(self, rows: int, num_timesteps: int, ranks: Ranks) -> Int[Tensor, "b k"]:
        return ranks.sample(torch.randint, *self.bounds(num_timesteps), rows=rows, shape=(self.draws,))


class LogitNormal(Timesteps):
    """The middle of the range is the most likely; see `logit_normal_timesteps`.

    Args:
        mean: mean of the normal variable; above 0, timesteps have more noise.
        sd: its standard deviation; the smaller it is, the closer the timesteps are to each other.

    Source: GenHancer (arXiv 2503.19480); Stable Diffusion 3 (arXiv 2403.03206), section 3.1.
    """

    def __init__(self, draws: int, range: Sequence[int] | None, mean: float, sd: float) -> None:
        super().__init__(draws, range)
        self.mean, self.sd = mean, sd

    def sample(self, rows: int, num_timesteps: int, ranks: Ranks) -> Int[Tensor, "b k"]:
        normal = ranks.sample(torch.randn, rows=rows, shape=(self.draws,))
        return logit_normal_timesteps(normal, self.mean, self.sd, *self.bounds(num_timesteps))
