"""A Lightning strategy for FSDP2 whose checkpoints are the same files that one device or DDP writes and reads."""

from collections.abc import Mapping
from inspect import signature
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.optim import Optimizer

from clipfix.training.sharding import full_tensor, like

PRECISIONS = ("32-true", "bf16-mixed")


class FSDP2(ModelParallelStrategy):
    """Fully sharded data parallelism over all ranks.

    Departs from Lightning's ModelParallelStrategy: weights are sharded over all ranks, where Lightning shards data over
    nodes and tensors within a node; and checkpoints have the format of every other strategy, with full tensors and the
    optimizer's own numbering. Lightning numbers the optimizer's states by all weights of the model, frozen ones
    included, in one group, which DDP cannot resume from.
    """

    def __init__(self) -> None:
        if "ignored_params" not in signature(fully_shard).parameters:
            raise ValueError(f"trainer=fsdp needs torch 2.7 or later, and this is {torch.__version__}.")
        super().__init__(save_distributed_checkpoint=False)

    def setup(self, trainer: L.Trainer) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            raise ValueError("trainer=fsdp shards trained weights, and nothing trains here: choose trainer=ddp or gpu.")
        if (precision := self.precision_plugin.precision) not in PRECISIONS:
            choices = " or ".join(PRECISIONS)
            raise ValueError(
                f"trainer.precision is {precision}, and trainer=fsdp keeps weights in fp32: choose {choices}."
            )
        super().setup(trainer)

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return full tensors on the first rank, which writes the checkpoint."""
        assert self.lightning_module is not None
        return {name: full_tensor(tensor) for name, tensor in self.lightning_module.state_dict().items()}

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        state: dict[str, Any] = Strategy.optimizer_state(self, optimizer)
        return state | {"state": {number: _each(full_tensor, moments) for number, moments in state["state"].items()}}

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        return Strategy.load_checkpoint(self, checkpoint_path, weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.lightning_module is not None
        current = self.lightning_module.state_dict()
        sharded = {name: like(tensor, current[name]) for name, tensor in checkpoint["state_dict"].items()}
        self.lightning_module.load_state_dict(sharded, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, stored in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            numbers = [number for group in stored["param_groups"] for number in group["params"]]
            weights = [weight for group in optimizer.param_groups for weight in group["params"]]
            sharded = {}
            for number, weight in zip(numbers, weights, strict=True):
                moments = stored["state"].get(number, {})
                alike = {k for k, v in moments.items() if k != "step" and getattr(v, "shape", None) == weight.shape}
                sharded[number] = {key: like(v, weight) if key in alike else v for key, v in moments.items()}
            state = {number: moments for number, moments in sharded.items() if moments}
            optimizer.load_state_dict(stored | {"state": state})


def _each(function: Any, moments: dict[str, Any]) -> dict[str, Any]:
    return {key: function(value) if isinstance(value, Tensor) else value for key, value in moments.items()}
