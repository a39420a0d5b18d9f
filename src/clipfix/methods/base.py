"""The contract every method meets: say what trains, and return named loss terms for a batch."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import lightning as L
import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.optim.lr_scheduler import LambdaLR

from clipfix.data.needs import Needs
from clipfix.functional.contrastive import contrastive_loss
from clipfix.models.adapters import merged
from clipfix.models.clip import Backbone
from clipfix.models.tokenizer import TokenizeBatch
from clipfix.system.ranks import rank_of
from clipfix.training.precision import fp32_products
from clipfix.training.sharding import local, reshard, rows_here, shard, shared, unshard

MAX_LOGIT_SCALE = math.log(100)  # CLIP (arXiv 2103.00020), section 2.5: the temperature is kept from growing further.


@dataclass(frozen=True)
class Stage:
    """A part that trains from optimizer step `first` until before `end`; `lr` where it is not the optimizer's."""

    module: nn.Module
    first: int
    end: int
    lr: float | None = None

    def factor(self, step: int, warmup_steps: int) -> float:
        """On the learning rate: warm-up and cosine within the stage."""
        return warmup_cosine(max(0, step - self.first), min(warmup_steps, self.end - self.first), self.end - self.first)


class Method(L.LightningModule, ABC):
    """Everything that all repairs share, so that a method is its `__init__` and its `loss(batch)`.

    `optimizer` names one of torch.optim and its settings, null ones left out. The learning rate warms up linearly over
    `warmup_steps` and falls to zero along a cosine at `steps`, counted in optimizer steps. A method that trains one
    part after another says so in `stages`; each then has such a schedule of its own.
    """

    # What a batch must carry. A constructor sets it; the data module checks it before anything runs.
    needs: Needs

    # A checkpoint holds trained weights only; `on_load_checkpoint` checks that they are exactly those trained here.
    strict_loading = False

    def __init__(
        self,
        backbone: Backbone,
        optimizer: dict[str, Any],
        steps: int,
        warmup_steps: int,
    ):
        super().__init__()
        if not 0 <= warmup_steps <= steps:
            raise ValueError(f"method.warmup_steps is {warmup_steps}: set it between 0 and method.steps ({steps}).")
        self.backbone = backbone
        if not hasattr(torch.optim, optimizer["name"]):
            raise ValueError(f"method.optimizer.name is {optimizer['name']}: name a class of torch.optim, as in AdamW.")
        self.optimizer_settings = {key: value for key, value in optimizer.items() if value is not None}
        self.steps = steps
        self.warmup_steps = warmup_steps
        self.seed = torch.initial_seed()
        self.batches_seen = 0
        self.config_yaml = ""
        self.notes: dict[str, float | Tensor] = {}
        self.frozen_rows: dict[str, Tensor] = {}

    @abstractmethod
    def loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Named loss terms of this rank's batch; the step minimizes their sum."""

    def clip_needs(self, *texts: str, count_cut: bool = False) -> Needs:
        """Return the needs of a method that reads the backbone's images, and texts tokenized for its text tower."""
        encode = (TokenizeBatch(self.backbone.tokens, texts, count_cut=count_cut),) if texts else ()
        return Needs(self.backbone.image_size, texts, encode)

    def tokens(self, batch: Mapping[str, Any], name: str) -> Int[Tensor, "b l"]:
        """Return the token ids of a named text: those that the loader made, or of the strings of a batch without."""
        made = batch.get("tokens", {})
        return made[name] if name in made else self.backbone.tokenize(batch[name])

    # -- one step ---------------------------------------------------------------------------------------------------

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        self.seed_draws(self.batches_seen)
        with self.matmul_precision():
            terms = self.loss(batch)
        self.batches_seen += 1
        return self.log_terms("train", terms, batch)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        with self.matmul_precision():
            super().backward(loss, *args, **kwargs)

    def matmul_precision(self) -> AbstractContextManager[None]:
        """Let the losses of a mixed-precision step on a GPU use TF32.

        Their features come out of towers in bf16, which has 8 bits where TF32 has 11. Scores are taken outside of a
        step, in fp32, and FFF mines in fp32: which pairs are positives must not hang on rounding.
        """
        if self.device.type != "cuda" or self.trainer.precision in ("32-true", "64-true"):
            return nullcontext()
        return fp32_products("high")

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        # The same draws at every check, so that two checks differ by the weights alone.
        self.seed_draws(batch_idx)
        self.log_terms("val", self.loss(batch), batch)

    def log_terms(self, stage: Literal["train", "val"], terms: dict[str, Tensor], batch: dict[str, Any]) -> Tensor:
        """Return their sum. Log it and each term: in training the mean over ranks, every `log_every_n_steps`-th step,
        with one reduction for all values; in validation the mean over a pass."""
        total = torch.stack(list(terms.values())).sum()
        values: dict[str, float | Tensor] = {f"{stage}/{name}": value.detach() for name, value in terms.items()}
        values[f"{stage}/loss"] = total.detach()
        if stage == "train":
            # A reduction makes all ranks, and the device, wait for each other: not in every step, nor one a value.
            every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
            if self.global_step > 0 and (self.global_step + 1) % max(every, 1):
                return total
            values |= self.notes
            scalars = [torch.as_tensor(value, dtype=total.dtype, device=total.device) for value in values.values()]
            reduced = self.trainer.strategy.reduce(torch.stack(scalars), reduce_op="mean")
            values = dict(zip(values, reduced, strict=True))
        for name, value in values.items():
            on_bar = name == f"{stage}/loss"
            self.log(name, value, batch_size=self.share(batch), sync_dist=stage == "val", prog_bar=on_bar)
        return total

    def share(self, batch: dict[str, Any]) -> int:
        """How much a batch counts in a mean over batches and ranks: as its images.

        Lightning divides the sum of this over ranks by their number and drops the remainder: with 8.25 images a rank,
        as last batches are uneven, a mean was 3 % too large. So an image counts as many times as there are ranks.
        """
        return len(batch["image"]) * rank_of()[1]

    def note(self, name: str, value: float | Tensor) -> None:
        """Add a fact about this step beside its losses, for the logger; every rank must note the same names."""
        self.notes[name] = value

    def on_train_batch_end(self, *_: Any) -> None:
        if self.backbone.logit_scale.requires_grad:  # frozen, it stays as published, even a rounding above the limit
            with torch.no_grad():
                local(self.backbone.logit_scale).clamp_(max=MAX_LOGIT_SCALE)

    # -- sharded weights (trainer=fsdp): gathered as `loss` runs, and held whole by every rank in validation, where one
    # -- may have more batches than another

    def configure_model(self) -> None:
        if self.device_mesh is not None:
            shard(self, self.device_mesh["data_parallel"])
            register_fsdp_forward_method(self, "loss")
            for name in self.frozen_rows:  # their tables are other parameters now
                self.get_parameter(name).register_post_accumulate_grad_hook(partial(self.clear_rows, name))

    def on_validation_epoch_start(self) -> None:
        unshard(self)

    def on_validation_epoch_end(self) -> None:
        reshard(self)

    # -- randomness: the draws of step n depend on (seed, n) alone, so a resumed run repeats an uninterrupted one ------

    def seed_draws(self, batch_number: int) -> None:
        state = np.random.SeedSequence([self.seed % 2**63, batch_number]).generate_state(1, np.uint64)
        self.generator = torch.Generator(self.device).manual_seed(int(state[0] >> 1))

    def draw(self, sampler: Callable[..., Tensor], *args: Any, rows: int, shape: tuple[int, ...] = ()) -> Tensor:
        """This rank's rows of `sampler(*args, (joined batch, *shape))`: two ranks draw what one rank would."""
        joined = sampler(*args, (rows * self.world_size, *shape), generator=self.generator, device=self.device)
        return joined[rows * self.rank : rows * (self.rank + 1)]

    # -- ranks: joined in training; in validation each scores its own rows, as the last batches differ in length -------

    @property
    def world_size(self) -> int:
        return rank_of()[1] if self.training else 1

    @property
    def rank(self) -> int:
        return rank_of()[0] if self.training else 0

    def gather(self, rows: Tensor) -> Tensor:
        """The rows of every rank, joined, with gradient."""
        return Gather.apply(rows) if self.world_size > 1 else rows

    @property
    def scale(self) -> Float[Tensor, ""]:
        """The inverse temperature, whole on every rank."""
        return shared(self.backbone.logit_scale).exp()

    def contrast(
        self, image: Float[Tensor, "b d"], text: Float[Tensor, "b d"], label_smoothing: float
    ) -> Float[Tensor, ""]:
        """The contrastive loss of this rank's normalized rows against every rank's, at the model's temperature."""
        return contrastive_loss(
            image,
            text,
            all_image=self.gather(image),
            all_text=self.gather(text),
            scale=self.scale,
            first_row=self.rank * len(image),
            label_smoothing=label_smoothing,
        )

    # -- what trains --------------------------------------------------------------------------------------------------

    def freeze_rows(self, table: nn.Parameter, rows: int) -> None:
        """The first rows of a trained table stay as they are, bit for bit, whatever the optimizer."""
        name = next(name for name, weight in self.named_parameters() if weight is table)
        self.frozen_rows[name] = table.detach()[:rows].clone()
        table.register_post_accumulate_grad_hook(partial(self.clear_rows, name))

    def clear_rows(self, name: str, table: Tensor) -> None:
        """No gradient for those of the frozen rows that this rank holds, its first ones."""
        assert table.grad is not None
        local(table.grad)[: len(self.frozen_rows[name][rows_here(table)])] = 0

    @torch.no_grad()
    def restore_rows(self, *_: Any) -> None:
        for name, rows in self.frozen_rows.items():
            table = self.get_parameter(name)
            if rows.device != table.device:
                self.frozen_rows[name] = rows = rows.to(table.device)
            here = rows[rows_here(table)]
            local(table)[: len(here)] = here

    def stages(self) -> list[Stage]:
        """What trains when: all that asks for a gradient, from the first step to the last."""
        return [Stage(self, 0, self.steps)]

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        settings = dict(self.optimizer_settings)
        groups: list[dict[str, Any]] = []
        factors: list[Callable[[int], float]] = []
        for stage in self.stages():
            for group in parameter_groups(stage.module):
                groups.append(group if stage.lr is None else group | {"lr": stage.lr})
                factors.append(partial(stage.factor, warmup_steps=self.warmup_steps))
        optimizer = getattr(torch.optim, settings.pop("name"))(groups, **settings)
        optimizer.register_step_post_hook(self.restore_rows)
        schedule = LambdaLR(optimizer, factors)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step", "name": "optimizer/lr"},
        }

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """A weight without a gradient is one that no optimizer touches, by decay or momentum either."""
        for stage in self.stages():
            if not stage.first <= self.global_step < stage.end:
                for parameter in stage.module.parameters():
                    parameter.grad = None

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def trained_names(self) -> set[str]:
        return {name for name, parameter in self.named_parameters() if parameter.requires_grad}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """`state_dict` is what others load, a plain CLIP's weights; `training` what resuming needs, those that train.

        They differ with WiSE, which interpolates `state_dict` and puts the others aside, and LoRA, merged in it; equal
        ones are stored once.
        """
        trained = self.trained_names()
        weights, training = (
            {name: weight for name, weight in state.items() if name in trained}
            for state in (checkpoint["state_dict"], checkpoint.get("training", checkpoint["state_dict"]))
        )
        checkpoint["state_dict"], checkpoint["training"] = merged(self, weights), training
        checkpoint["batches_seen"] = self.batches_seen
        checkpoint["config_yaml"] = self.config_yaml

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = checkpoint.get("training", checkpoint["state_dict"])  # of older files, the only one
        own, stored = self.state_dict(), checkpoint["state_dict"]
        shapes = {name: weight.shape for name, weight in stored.items()}
        trained = {name: own[name].shape for name in self.trained_names()}
        if wrong := {name for name, _ in shapes.items() ^ trained.items()}:
            raise ValueError(
                f"The checkpoint trains other weights than this config does ({len(wrong)} differ, e.g. {min(wrong)}). "
                "Use the method and backbone of the run that wrote it; its config is stored in it as config_yaml."
            )
        self.batches_seen = checkpoint["batches_seen"]


def check_choice(key: str, value: object, *choices: str | None) -> None:
    """Refuses a value of `method.<key>` that is none of those that there are."""
    if value not in choices:
        names = [choice or "null" for choice in choices]
        raise ValueError(f"method.{key} is {value}: choose {', '.join(names[:-1])} or {names[-1]}.")


def by_sample(batch: Mapping[str, Any], name: str) -> list[list[str]]:
    """The texts of that name, those of each sample together."""
    each = len(batch[name]) // len(batch["image"])
    return [batch[name][start : start + each] for start in range(0, len(batch[name]), each)]


class Gather(torch.autograd.Function):
    """all_gather whose backward sums over ranks what each rank's loss asks of these rows; DDP then averages.

    torch has had three names for this since 2.6, each deprecating the last.
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


def parameter_groups(module: nn.Module) -> list[dict[str, Any]]:
    """Trained parameters in two groups: matrices decay; norms, biases, scalars and embedding tables do not.

    Source: CLIP (arXiv 2103.00020), section 2.5, decays "all weights that are not gains or biases"; tables of
    positions and the class token join them here, because decay would pull rows that a batch never reads to zero.
    """
    decay: list[nn.Parameter] = []
    keep: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            is_table = name.endswith(("positional_embedding", "class_embedding", "pos_embed"))
            (keep if parameter.ndim < 2 or is_table else decay).append(parameter)
    groups: list[dict[str, Any]] = [{"params": decay}, {"params": keep, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def warmup_cosine(step: int, warmup_steps: int, steps: int) -> float:
    """Factor on the learning rate at optimizer step `step`: linear from 1 / warmup_steps, then half a cosine to 0."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return (1 + math.cos(math.pi * min(1.0, (step - warmup_steps) / max(1, steps - warmup_steps)))) / 2
