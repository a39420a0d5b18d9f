"""The contract of every method: what it reads from a batch, what it trains, and the named loss terms of a batch."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, Literal, Unpack

import lightning as L
import torch
from jaxtyping import Float, Int
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from clipfix.data.needs import Needs
from clipfix.functional.contrastive import contrastive_loss
from clipfix.models.adapters import merged
from clipfix.models.base import Model
from clipfix.models.clip import Backbone
from clipfix.models.tokenizer import TokenizeBatch
from clipfix.system.ranks import rank_of
from clipfix.training.frozen_rows import FrozenRows
from clipfix.training.phases import Phase, Training, optimizer_of
from clipfix.training.precision import fp32_products
from clipfix.training.ranks import Ranks
from clipfix.training.sharding import local, reshard, shard, shared, unshard

MAX_LOGIT_SCALE = math.log(100)  # CLIP (arXiv 2103.00020), section 2.5: the temperature is kept from growing further.


class Method(L.LightningModule, ABC):
    """Base class of all methods. A subclass writes `__init__` and `loss`, and sets `needs`.

    A backbone may arrive with any `requires_grad`: the constructor sets which of its weights train. `wrap` and `start`
    have defaults that do nothing.

    Args:
        backbone: the model to repair.
        training: `optimizer`, `schedule` and `steps`, as `Training` describes them.
    """

    needs: Needs  # what a batch must carry; the data module checks it before anything runs

    # Keys of the config by which a user can lower memory; the message names them when memory runs out.
    memory: ClassVar[tuple[str, ...]] = ()

    # A checkpoint holds trained weights only; `on_load_checkpoint` checks that they are exactly those trained here.
    strict_loading = False

    def __init__(self, backbone: Backbone, **training: Unpack[Training]):
        super().__init__()
        optimizer, self.schedule, self.steps = training["optimizer"], training["schedule"], training["steps"]
        self.schedule.check(self.steps)
        if not hasattr(torch.optim, optimizer["name"]):
            raise ValueError(f"method.optimizer.name is {optimizer['name']}: name a class of torch.optim, as in AdamW.")
        self.optimizer_settings = {key: value for key, value in optimizer.items() if value is not None}
        self.backbone = backbone
        self.ranks = Ranks(torch.initial_seed())
        self.frozen_rows = FrozenRows(self)
        self.batches_seen = 0
        self.config_yaml = ""
        self.notes: dict[str, float | Tensor] = {}

    # -- what a subclass defines --------------------------------------------------------------------------------------

    @abstractmethod
    def loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Return named loss terms of this rank's batch; a step minimizes their sum. Never called if `steps` is 0."""

    def wrap(self, backbone: Backbone) -> Model:
        """Return the model to score, around a backbone that has its pretrained weights. Default: the backbone.

        A method whose model has state of its own keeps one as `self.model = self.wrap(backbone)`.
        """
        return backbone

    def start(self, batches: Iterable[dict[str, Any]]) -> None:
        """Prepare from training batches, once before the first step and not on resume. Default: do nothing.

        `batches` are the first ones of the training data, on the device; none of them counts as trained on. They are
        loaded when they are iterated over.
        """

    def phases(self) -> list[Phase]:
        """Return what trains when. Default: all that requires a gradient, from the first step to the last."""
        return [Phase(self, 0, self.steps)]

    @property
    def scored(self) -> Model:
        """The model that is scored as it trains: `model` of a method that has a wrapped one, else the backbone."""
        return getattr(self, "model", self.backbone)

    # -- helpers for subclasses ---------------------------------------------------------------------------------------

    def clip_needs(self, *texts: str, count_cut: bool = False) -> Needs:
        """Return the needs of a method that reads the backbone's images, and texts tokenized for its text tower."""
        encode = (TokenizeBatch(self.backbone.tokens, texts, count_cut=count_cut),) if texts else ()
        return Needs(self.backbone.image_size, texts, encode)

    def tokens(self, batch: Mapping[str, Any], name: str) -> Int[Tensor, "b l"]:
        """Return the token ids of a named text: those made by the loader, or those of the strings if it made none."""
        made = batch.get("tokens", {})
        return made[name] if name in made else self.backbone.tokenize(batch[name])

    @property
    def scale(self) -> Float[Tensor, ""]:
        """The inverse temperature, whole on every rank."""
        return shared(self.backbone.logit_scale).exp()

    def contrast(
        self, image: Float[Tensor, "b d"], text: Float[Tensor, "b d"], label_smoothing: float
    ) -> Float[Tensor, ""]:
        """Return the contrastive loss of this rank's unit-norm rows against those of all ranks."""
        return contrastive_loss(
            image,
            text,
            all_image=self.ranks.gather(image),
            all_text=self.ranks.gather(text),
            scale=self.scale,
            first_row=self.ranks.rank * len(image),
            label_smoothing=label_smoothing,
        )

    def note(self, name: str, value: float | Tensor) -> None:
        """Log a value of this step beside its losses. Every rank must note the same names."""
        self.notes[name] = value

    # -- one step -----------------------------------------------------------------------------------------------------

    def seed_draws(self, batch_number: int) -> None:
        """Start the random draws of a batch: they depend on (seed, batch_number) alone."""
        self.ranks.reseed(batch_number, self.device)

    def terms(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Return the loss terms of the phase that holds the current step."""
        active = [phase for phase in self.phases() if phase.holds(self.global_step)]
        own_loss = next((phase.loss for phase in active if phase.loss is not None), None)
        if own_loss is None:
            return self.loss(batch)
        terms = own_loss(batch)
        # DDP waits for a gradient of every weight, so weights that rest in this phase get zeros. FSDP2 waits for none,
        # and holds in parts what no forward pass gathers.
        trained = {weight for phase in active for weight in phase.module.parameters()}
        resting = [w for w in self.parameters() if w.requires_grad and w not in trained and not isinstance(w, DTensor)]
        first = next(iter(terms))
        return terms | {first: terms[first] + 0 * sum(weight.sum() for weight in resting)}

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        self.seed_draws(self.batches_seen)
        with self.matmul_precision():
            terms = self.terms(batch)
        self.batches_seen += 1
        return self.log_terms("train", terms, batch)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        with self.matmul_precision():
            super().backward(loss, *args, **kwargs)

    def matmul_precision(self) -> AbstractContextManager[None]:
        """Let the losses of a mixed-precision step on a GPU use TF32.

        Their features come out of towers in bf16, which has 8 bits where TF32 has 11. Scores are taken outside of a
        step, in fp32. FFF mines in fp32: which pairs are positives must not depend on rounding.
        """
        if self.device.type != "cuda" or self.trainer.precision in ("32-true", "64-true"):
            return nullcontext()
        return fp32_products("high")

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        # The same draws at every check, so that two checks differ by the weights alone.
        self.seed_draws(batch_idx)
        self.log_terms("val", self.terms(batch), batch)

    def log_terms(self, stage: Literal["train", "val"], terms: dict[str, Tensor], batch: dict[str, Any]) -> Tensor:
        """Return the sum of the terms; log it and each term.

        In training the mean over ranks is logged every `log_every_n_steps`-th step, with one reduction for all values.
        In validation the mean over a pass is logged.
        """
        total = torch.stack(list(terms.values())).sum()
        values: dict[str, float | Tensor] = {f"{stage}/{name}": value.detach() for name, value in terms.items()}
        values[f"{stage}/loss"] = total.detach()
        if stage == "train":
            # A reduction makes all ranks, and the device, wait for each other: not in every step, nor one for a value.
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
        """Return the weight of this batch in means over batches and ranks: its number of images times the ranks.

        Lightning divides the sum of this over ranks by their number and drops the remainder. With 8.25 images for each
        rank, as last batches are uneven, a mean was 3 % too large. So an image counts as often as there are ranks.
        """
        return len(batch["image"]) * rank_of()[1]

    def on_train_batch_end(self, *_: Any) -> None:
        if self.backbone.logit_scale.requires_grad:  # frozen, it stays as published, even a rounding above the limit
            with torch.no_grad():
                local(self.backbone.logit_scale).clamp_(max=MAX_LOGIT_SCALE)

    # -- before the first step ----------------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        if self.steps == 0:  # Lightning then starts no training
            self.start(self.first_batches())

    def on_train_start(self) -> None:
        if self.batches_seen == 0:
            self.start(self.first_batches())

    def first_batches(self) -> Iterator[dict[str, Any]]:
        """Yield training batches on the device, as a step gets them, without moving on in the data."""
        data: Any = getattr(self.trainer, "datamodule", None)
        position = data.state_dict() if data is not None else {}
        loader: Any = data.train_dataloader() if data is not None else self.trainer.train_dataloader
        for batch in loader:
            moved = self.trainer.strategy.batch_to_device(batch, self.device)
            if position:
                data.load_state_dict(position)
            yield moved

    # -- sharded weights (trainer=fsdp): gathered as `terms` runs, and whole on every rank in validation, where one rank
    # -- may have more batches than another

    def configure_model(self) -> None:
        if self.device_mesh is not None:
            shard(self, self.device_mesh)
            register_fsdp_forward_method(self, "terms")
            self.frozen_rows.hook_again()

    def on_validation_epoch_start(self) -> None:
        unshard(self)

    def on_validation_epoch_end(self) -> None:
        reshard(self)

    # -- what trains --------------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        return optimizer_of(self.phases(), self.optimizer_settings, self.schedule, self.frozen_rows.restore)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Take the gradient from weights that rest: an optimizer leaves them alone, decay and momentum included."""
        for phase in self.phases():
            if not phase.holds(self.global_step):
                for parameter in phase.module.parameters():
                    parameter.grad = None

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def trained_names(self) -> set[str]:
        """Return the names of what a checkpoint holds: by default all that requires a gradient."""
        return {name for name, parameter in self.named_parameters() if parameter.requires_grad}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep in `state_dict` what others load, weights of a plain CLIP, and in `training` what resuming needs.

        The two differ with WiSE, which interpolates `state_dict`, and with LoRA, which is merged into it. Equal
        tensors are stored once.
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
        checkpoint["state_dict"] = checkpoint.get("training", checkpoint["state_dict"])  # older files have one alone
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
    """Raise ValueError if `method.<key>` is none of the choices."""
    if value not in choices:
        names = [choice or "null" for choice in choices]
        raise ValueError(f"method.{key} is {value}: choose {', '.join(names[:-1])} or {names[-1]}.")
