"""Learning rate schedules over the optimizer steps of a phase."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence


class Schedule(ABC):
    """A linear warm-up, followed by a schedule that a subclass defines.

    Args:
        warmup_steps: optimizer steps until the full learning rate; the first step has 1 / warmup_steps of it.
    """

    def __init__(self, warmup_steps: int) -> None:
        self.warmup_steps = warmup_steps

    def check(self, steps: int) -> None:
        """Raise ValueError if the warm-up is longer than the run."""
        if not 0 <= self.warmup_steps <= steps:
            raise ValueError(
                f"method.schedule.warmup_steps is {self.warmup_steps}: set it between 0 and method.steps ({steps})."
            )

    def factor(self, step: int, steps: int) -> float:
        """Return the factor on the learning rate at optimizer step `step` (from 0) of a phase of `steps` steps."""
        warmup = min(self.warmup_steps, steps)
        if step < warmup:
            return (step + 1) / warmup
        return self.after_warmup(step - warmup, max(1, steps - warmup))

    @abstractmethod
    def after_warmup(self, step: int, steps: int) -> float:
        """Return the factor at `step`, counted from the end of the warm-up, of `steps` remaining steps."""


class Cosine(Schedule):
    """Half a period of a cosine, from the full learning rate to a fraction of it.

    Args:
        warmup_steps: see `Schedule`.
        floor: the last learning rate, as a fraction of the full one.

    Source: SGDR (arXiv 1608.03983), equation 5, without restarts.
    """

    def __init__(self, warmup_steps: int, floor: float) -> None:
        super().__init__(warmup_steps)
        if not 0 <= floor <= 1:
            raise ValueError(
                f"method.schedule.floor is {floor}: set it between 0 and 1, a fraction of the learning rate."
            )
        self.floor = floor

    def after_warmup(self, step: int, steps: int) -> float:
        return self.floor + (1 - self.floor) * (1 + math.cos(math.pi * min(1.0, step / steps))) / 2


class Steps(Schedule):
    """The full learning rate, multiplied by a factor at some of the steps after the warm-up.

    Args:
        warmup_steps: see `Schedule`.
        at: when the learning rate drops, as fractions of the steps after the warm-up.
        factor: factor on the learning rate at each drop.
    """

    def __init__(self, warmup_steps: int, at: Sequence[float], factor: float) -> None:
        super().__init__(warmup_steps)
        if not all(0 < fraction < 1 for fraction in at):
            raise ValueError(f"method.schedule.at is {list(at)}: give fractions of the steps, each between 0 and 1.")
        self.at, self.drop = list(at), factor

    def after_warmup(self, step: int, steps: int) -> float:
        return self.drop ** sum(step >= fraction * steps for fraction in self.at)
