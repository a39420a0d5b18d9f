"""How Lightning runs what `sharding.py` splits: checkpoints stay the files that one device or DDP writes and reads."""

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

from clipfix.training.sharding import like, whole

PRECISIONS = ("32-true", "bf16-mixed")


class FSDP2(ModelParallelStrategy):
    """Fully sharded data parallelism over all ranks.

    Departs from Lightning's ModelParallelStrategy: all ranks are data-parallel, where it takes one a node; and a
    checkpoint is the one of every other strategy, whole tensors and the optimizer's own numbering. Lightning numbers
    the optimizer's states by all weights of the model, frozen ones too, in one group: DDP could not go on from that.
    """

    def __init__(self) -> None:
        if "ignored_params" not in signature(fully_shard).parameters:
            raise ValueError(f"trainer=fsdp needs torch 2.7 or later, and this is {torch.__version__}.")
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def setup(self, trainer: L.Trainer) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            raise ValueError("trainer=fsdp splits what trains, and nothing trains here: choose trainer=ddp or gpu.")
        if (precision := self.precision_plugin.precision) not in PRECISIONS:
            choices = " or ".join(PRECISIONS)
            raise ValueError(
                f"trainer.precision is {precision}: with trainer=fsdp, weights are fp32, choose {choices}."
            )
        super().setup(trainer)

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Whole, on the first rank, which writes it."""
        assert self.lightning_module is not None
        return {name: whole(tensor) for name, tensor in self.lightning_module.state_dict().items()}

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        found: dict[str, Any] = Strategy.optimizer_state(self, optimizer)
        return found | {"state": {number: _each(whole, moments) for number, moments in found["state"].items()}}

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        return Strategy.load_checkpoint(self, checkpoint_path, weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.lightning_module is not None
        own = self.lightning_module.state_dict()
        split = {name: like(tensor, own[name]) for name, tensor in checkpoint["state_dict"].items()}
        self.lightning_module.load_state_dict(split, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, stored in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            numbers = [number for group in stored["param_groups"] for number in group["params"]]
            weights = [weight for group in optimizer.param_groups for weight in group["params"]]
            split = {}
            for number, weight in zip(numbers, weights, strict=True):
                moments = stored["state"].get(number, {})
                alike = {k for k, v in moments.items() if k != "step" and getattr(v, "shape", None) == weight.shape}
                split[number] = {key: like(v, weight) if key in alike else v for key, v in moments.items()}
            optimizer.load_state_dict(stored | {"state": {number: found for number, found in split.items() if found}})


def _each(function: Any, moments: dict[str, Any]) -> dict[str, Any]:
    return {key: function(value) if isinstance(value, Tensor) else value for key, value in moments.items()}
