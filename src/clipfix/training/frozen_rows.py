"""Frozen rows of a trained table: they stay bit-identical with any optimizer."""

from functools import partial

import torch
from torch import Tensor, nn

from clipfix.training.sharding import local, rows_here


class FrozenRows:
    """Freezes the first rows of some parameters of a module.

    Their gradients are set to zero when they are accumulated. The rows are also restored after each optimizer step,
    because weight decay and momentum change weights that have no gradient.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.rows: dict[str, Tensor] = {}

    def freeze(self, table: nn.Parameter, rows: int) -> None:
        """Freeze the first `rows` rows of a parameter of the module."""
        name = next(name for name, weight in self.module.named_parameters() if weight is table)
        self.rows[name] = table.detach()[:rows].clone()
        table.register_post_accumulate_grad_hook(partial(self._clear, name))

    def hook_again(self) -> None:
        """Register the hooks again, after parameters were replaced by sharded ones."""
        for name in self.rows:
            self.module.get_parameter(name).register_post_accumulate_grad_hook(partial(self._clear, name))

    def _clear(self, name: str, table: Tensor) -> None:
        """Set the gradient of the frozen rows to zero, as far as this rank holds them: they are its first rows."""
        assert table.grad is not None
        local(table.grad)[: len(self.rows[name][rows_here(table)])] = 0

    @torch.no_grad()
    def restore(self, *_: object) -> None:
        """Restore the frozen rows. The optimizer calls it after each step."""
        for name, rows in self.rows.items():
            table = self.module.get_parameter(name)
            if rows.device != table.device:
                self.rows[name] = rows = rows.to(table.device)
            here = rows[rows_here(table)]
            local(table)[: len(here)] = here
