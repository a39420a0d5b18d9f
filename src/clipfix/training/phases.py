"""Phases of training, and the optimizer and learning rate schedule of all phases."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from typing_extensions import TypedDict

from clipfix.training.schedules import Schedule


class Training(TypedDict):
    """Arguments that every method passes to its base class.

    optimizer: `name`, a class of torch.optim, and its arguments; those that are null are left out.
    schedule: factor on the learning rate. It starts anew in each phase.
    steps: optimizer steps of the whole run; 0 for no training.
    """

    optimizer: dict[str, Any]
    schedule: Schedule
    steps: int


@dataclass(frozen=True)
class Phase:
    """A module that trains from optimizer step `first` to `end` - 1.

    Args:
        module: the parameters of it that require a gradient train in this phase.
        first: the first optimizer step.
        end: the optimizer step after the last.
        lr: learning rate; None for the optimizer's.
        loss: returns named loss terms of a batch during this phase; None for the method's `loss`.
    """

    module: nn.Module
    first: int
    end: int
    lr: float | None = None
    loss: Callable[[dict[str, Any]], dict[str, Tensor]] | None = None

    def holds(self, step: int) -> bool:
        """Return whether an optimizer step belongs to this phase."""
        return self.first <= step < self.end

    def factor(self, step: int, schedule: Schedule) -> float:
        """Return the factor on the learning rate at an optimizer step of the run."""
        return schedule.factor(max(0, step - self.first), self.end - self.first)


def optimizer_of(
    phases: list[Phase], settings: Mapping[str, Any], schedule: Schedule, after_step: Callable[..., None]
) -> OptimizerLRSchedulerConfig:
    """Return one optimizer for the parameters of all phases, and a schedule for each group, in Lightning's format.

    Args:
        phases: the phases of the run.
        settings: `name` of a class of torch.optim, and its arguments.
        schedule: factor on the learning rate.
        after_step: called after each optimizer step.
    """
    arguments = dict(settings)
    groups: list[dict[str, Any]] = []
    factors: list[Callable[[int], float]] = []
    for phase in phases:
        for group in parameter_groups(phase.module):
            groups.append(group if phase.lr is None else group | {"lr": phase.lr})
            factors.append(partial(phase.factor, schedule=schedule))
    optimizer = getattr(torch.optim, arguments.pop("name"))(groups, **arguments)
    optimizer.register_step_post_hook(after_step)
    return {
        "optimizer": optimizer,
        "lr_scheduler": {"scheduler": LambdaLR(optimizer, factors), "interval": "step", "name": "optimizer/lr"},
    }


def parameter_groups(module: nn.Module) -> list[dict[str, Any]]:
    """Return the trained parameters in two groups, with weight decay (matrices) and without (all others).

    Source: CLIP (arXiv 2103.00020), section 2.5, decays "all weights that are not gains or biases". Here the position
    tables and the class token do not decay either, because decay would move rows to zero that no batch reads.
    """
    decay: list[nn.Parameter] = []
    no_decay: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            is_table = name.endswith(("positional_embedding", "class_embedding", "pos_embed"))
            (no_decay if parameter.ndim < 2 or is_table else decay).append(parameter)
    groups: list[dict[str, Any]] = [{"params": decay}, {"params": no_decay, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
