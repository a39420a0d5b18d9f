"""Learning rate schedules over the optimizer steps of a phase."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence


class Schedule(ABC):
    """Base class of schedules: a linear warm-up, followed by `after_warmup` of a subclass.

    Args:
        warmup_steps: optimizer steps until the full learning rate; the first has 1 / warmup_steps of it.
    """

    def __init__(self, warmup_steps: int) -> None:
        self.warmup_steps = warmup_steps

    def check(self, steps: int) -> None:
        """Raise ValueError if the warm-up does not fit into the steps of the run."""
        if not 0 <= self.warmup_steps <= steps:
            raise ValueError(
                f"method.schedule.warmup_steps is {self.warmup_steps}: set it between 0 and method.steps ({steps})."
            )

    def factor(self, step: int, steps: int) -> float:
        """Return the factor on the learning rate at `step`, counted from 0, of a phase of `steps` optimizer steps."""
        warmup = min(self.warmup_steps, steps)
        if step < warmup:
            return (step + 1) / warmup
        return self.after_warmup(step - warmup, max(1, steps - warmup))

    @abstractmethod
    def after_warmup(self, step: int, steps: int) -> float:
        """Return the factor at `step`, counted from the end of the warm-up, of the `steps` that remain."""


class Cosine(Schedule):
    """Half a cosine from the full learning rate to `floor` times it.

    Source: SGDR (arXiv 1608.03983), equation 5, without restarts.
    """

    def __init__(self, warmup_steps: int, floor: float) -> None:
        super().__init__(warmup_steps)
        if not 0 <= floor <= 1:
            raise ValueError(
                f"method.schedule.floor is {floor}: set the last factor on the learning rate, between 0 and 1."
            )
        self.floor = floor

    def after_warmup(self, step: int, steps: int) -> float:
        return self.floor + (1 - self.floor) * (1 + math.cos(math.pi * min(1.0, step / steps))) / 2


class Steps(Schedule):
    """The full learning rate, multiplied by `factor` at given fractions of the steps after the warm-up.

    Args:
        at: fractions of the steps after the warm-up, each between 0 and 1.
        factor: factor on the learning rate at each of them.
    """

    def __init__(self, warmup_steps: int, at: Sequence[float], factor: float) -> None:
        super().__init__(warmup_steps)
        if not all(0 < share < 1 for share in at):
            raise ValueError(f"method.schedule.at is {list(at)}: set fractions of the steps, each between 0 and 1.")
        self.at, self.drop = list(at), factor

    def after_warmup(self, step: int, steps: int) -> float:
        return self.drop ** sum(step >= share * steps for share in self.at)
