"""The first rows of a trained table, kept bit-identical whatever the optimizer does."""

from functools import partial

import torch
from torch import Tensor, nn

from clipfix.training.sharding import local, rows_here


class FrozenRows:
    """Keeps the first rows of some parameters as they are.

    Their gradients are set to zero as they are accumulated, and the rows are written back after each optimizer step,
    because weight decay and momentum move a weight without a gradient too.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.rows: dict[str, Tensor] = {}

    def freeze(self, table: nn.Parameter, rows: int) -> None:
        """Keep the first `rows` rows of a parameter of the module."""
        name = next(name for name, weight in self.module.named_parameters() if weight is table)
        self.rows[name] = table.detach()[:rows].clone()
        table.register_post_accumulate_grad_hook(partial(self._clear, name))

    def hook_again(self) -> None:
        """Hook the parameters once more, after they were replaced by sharded ones."""
        for name in self.rows:
            self.module.get_parameter(name).register_post_accumulate_grad_hook(partial(self._clear, name))

    def _clear(self, name: str, table: Tensor) -> None:
        """Set the gradient to zero for those of the rows that this rank holds: its first ones."""
        assert table.grad is not None
        local(table.grad)[: len(self.rows[name][rows_here(table)])] = 0

    @torch.no_grad()
    def restore(self, *_: object) -> None:
        """Write the rows back; an optimizer calls it after each step."""
        for name, rows in self.rows.items():
            table = self.module.get_parameter(name)
            if rows.device != table.device:
                self.rows[name] = rows = rows.to(table.device)
            here = rows[rows_here(table)]
            local(table)[: len(here)] = here
