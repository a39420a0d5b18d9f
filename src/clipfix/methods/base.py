"""The base class of all methods: which data a method needs, which weights train, and the loss terms of a batch."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, Literal, Unpack

import lightning as L
import torch
from jaxtyping import Bool, Float, Int
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from clipfix.data.needs import Needs
from clipfix.functional.contrastive import contrastive_loss
from clipfix.functional.positives import same_samples
from clipfix.functional.sigmoid import sigmoid_loss
from clipfix.models.adapters import merge_adapters
from clipfix.models.base import Model
from clipfix.models.clip import Backbone
from clipfix.models.tokenizer import TokenizeBatch
from clipfix.system.ranks import rank_of
from clipfix.training.frozen_rows import FrozenRows
from clipfix.training.phases import Phase, Training, optimizer_of
from clipfix.training.precision import fp32_products
from clipfix.training.ranks import Ranks
from clipfix.training.sharding import local, reshard, shard, shared, unshard

MAX_LOGIT_SCALE = math.log(100)  # limit of the inverse temperature: CLIP (arXiv 2103.00020), section 2.5
TILE = 1024  # samples whose logits the sigmoid loss of `contrast` holds at once; it changes no value


class Method(L.LightningModule, ABC):
    """Base class of all methods. A subclass writes `__init__` and `loss`, and sets `needs`.

    A backbone may arrive with any `requires_grad`: the constructor sets which of its weights train. `wrap` and `start`
    have defaults that do nothing.

    Args:
        backbone: the model to repair.
        training: `optimizer`, `schedule` and `steps`, as `Training` describes them.
    """

    needs: Needs  # the contents of a batch; the data module checks them before anything runs

    # Config keys that lower the memory use; the error message names them when memory runs out.
    memory: ClassVar[tuple[str, ...]] = ()

    # A checkpoint has the trained weights only; `on_load_checkpoint` checks that they are those that train here.
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
        """Return named loss terms of this rank's batch. A step minimizes their sum. Not called if `steps` is 0."""

    def wrap(self, backbone: Backbone) -> Model:
        """Return the model to score, given a backbone with pretrained weights. Default: the backbone itself.

        A method whose model has additional state, such as a few-shot head, sets `self.model = self.wrap(backbone)`.
        """
        return backbone

    def start(self, batches: Iterable[dict[str, Any]]) -> None:
        """Initialize from training batches, once before the first step and not on resume. Default: do nothing.

        Args:
            batches: the first batches of the training data, on the device, loaded as they are iterated over. Training
                starts from the first of them again.
        """

    def phases(self) -> list[Phase]:
        """Return the phases of training. Default: one, with all weights that require a gradient."""
        return [Phase(self, 0, self.steps)]

    @property
    def scored(self) -> Model:
        """The model to score during training: `model` if the method has a wrapped one, else the backbone."""
        return getattr(self, "model", self.backbone)

    # -- helpers for subclasses ---------------------------------------------------------------------------------------

    def clip_needs(self, *texts: str, count_cut: bool = False) -> Needs:
        """Return needs: images at the backbone's size, and texts tokenized for its text tower.

        Args:
            texts: names of the texts.
            count_cut: also count how many texts do not fit the context.
        """
        encode = (TokenizeBatch(self.backbone.tokens, texts, count_cut=count_cut),) if texts else ()
        return Needs(self.backbone.image_size, texts, encode)

    def tokens(self, batch: Mapping[str, Any], name: str) -> Int[Tensor, "b l"]:
        """Return the token ids of a named text, from the loader or, if it has none, from the strings of the batch."""
        tokens = batch.get("tokens", {})
        return tokens[name] if name in tokens else self.backbone.tokenize(batch[name])

    @property
    def scale(self) -> Float[Tensor, ""]:
        """The inverse temperature, the full value on every rank."""
        return shared(self.backbone.logit_scale).exp()

    def contrast(
        self, image: Float[Tensor, "b d"], text: Float[Tensor, "b d"], label_smoothing: float
    ) -> Float[Tensor, ""]:
        """Return the contrastive loss of this rank's features, of unit norm, against those of all ranks.

        A backbone with a logit bias was trained with the sigmoid loss, and keeps it: the softmax loss never sees the
        bias, so the probabilities of the trained model would be wrong. Source: SigLIP (arXiv 2303.15343), equation 1.
        """
        bias = self.backbone.logit_bias
        if bias is not None:
            self.check_smoothing(label_smoothing)
            texts, first = self.ranks.gather(text)[:, None], self.ranks.rank * len(image)

            def own(part: slice) -> Bool[Tensor, "b t 1"]:
                return same_samples(len(image), len(texts[part]), first - part.start, image.device)[..., None]

            return sigmoid_loss(image, texts, self.scale, shared(bias), own, TILE) / len(image)
        return contrastive_loss(
            image,
            text,
            all_image=self.ranks.gather(image),
            all_text=self.ranks.gather(text),
            scale=self.scale,
            first_row=self.ranks.rank * len(image),
            label_smoothing=label_smoothing,
        )

    def check_smoothing(self, label_smoothing: float) -> None:
        """Raise ValueError for label smoothing with a backbone that is trained with the sigmoid loss."""
        if label_smoothing and self.backbone.logit_bias is not None:
            raise ValueError(
                f"method.label_smoothing is {label_smoothing}, and backbone.name={self.backbone.name} is trained with "
                "the sigmoid loss, which has none: set method.label_smoothing=0."
            )

    def note(self, name: str, value: float | Tensor) -> None:
        """Log a value of this step, in addition to its losses. All ranks must use the same names."""
        self.notes[name] = value

    # -- one step -----------------------------------------------------------------------------------------------------

    def seed_draws(self, batch_number: int) -> None:
        """Seed the random draws of a batch. They depend on the seed of the run and `batch_number` alone."""
        self.ranks.reseed(batch_number, self.device)

    def terms(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Return the loss terms of the phase that contains the current step."""
        active = [phase for phase in self.phases() if phase.holds(self.global_step)]
        phase_loss = next((phase.loss for phase in active if phase.loss is not None), None)
        if phase_loss is None:
            return self.loss(batch)
        terms = phase_loss(batch)
        # DDP expects a gradient for every weight, so weights that do not train in this phase get zeros. FSDP2 expects
        # none, and its weights stay sharded unless a forward pass gathers them.
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
        """Return a context in which the losses of a mixed-precision step on a GPU use TF32.

        Their features come from towers in bf16, which has a precision of 8 bits; TF32 has 11. Scores are computed
        outside of a step, in fp32. FFF mines in fp32, because rounding must not change which pairs are positives.
        """
        if self.device.type != "cuda" or self.trainer.precision in ("32-true", "64-true"):
            return nullcontext()
        return fp32_products("high")

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        # The same draws in every validation pass, so that two passes differ by the weights alone.
        self.seed_draws(batch_idx)
        self.log_terms("val", self.terms(batch), batch)

    def log_terms(self, stage: Literal["train", "val"], terms: dict[str, Tensor], batch: dict[str, Any]) -> Tensor:
        """Return the sum of the terms, and log it and each term.

        In training, means over ranks are logged in every `log_every_n_steps`-th step, with one reduction for all
        values. In validation, means over the whole pass are logged.
        """
        total = torch.stack(list(terms.values())).sum()
        values: dict[str, float | Tensor] = {f"{stage}/{name}": value.detach() for name, value in terms.items()}
        values[f"{stage}/loss"] = total.detach()
        if stage == "train":
            # A reduction synchronizes all ranks and the device, so there is one for all values, and not in every step.
            every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
            if self.global_step > 0 and (self.global_step + 1) % max(every, 1):
                return total
            values |= self.notes
            scalars = [torch.as_tensor(value, dtype=total.dtype, device=total.device) for value in values.values()]
            reduced = self.trainer.strategy.reduce(torch.stack(scalars), reduce_op="mean")
            values = dict(zip(values, reduced, strict=True))
        for name, value in values.items():
            on_bar = name == f"{stage}/loss"
            self.log(name, value, batch_size=self.batch_weight(batch), sync_dist=stage == "val", prog_bar=on_bar)
        return total

    def batch_weight(self, batch: dict[str, Any]) -> int:
        """Return the weight of this batch in means over batches and ranks: images times ranks.

        Lightning divides the sum of the weights by the number of ranks and rounds down. The last batches of ranks may
        differ in size: with 8.25 images for each rank, a mean was 3 % too large. The factor makes the division exact.
        """
        return len(batch["image"]) * rank_of()[1]

    def on_train_batch_end(self, *_: Any) -> None:
        # A frozen temperature stays as published, even if rounding puts it above the limit. SigLIP's, published with
        # 110 to 118, has no limit (arXiv 2303.15343, algorithm 1).
        if self.backbone.logit_scale.requires_grad and self.backbone.logit_bias is None:
            with torch.no_grad():
                local(self.backbone.logit_scale).clamp_(max=MAX_LOGIT_SCALE)

    # -- before the first step ----------------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        if self.steps == 0:  # Lightning does not call `on_train_start` then
            self.start(self.first_batches())

    def on_train_start(self) -> None:
        if self.batches_seen == 0:
            self.start(self.first_batches())

    def first_batches(self) -> Iterator[dict[str, Any]]:
        """Yield training batches on the device, without changing the position in the data."""
        data: Any = getattr(self.trainer, "datamodule", None)
        position = data.state_dict() if data is not None else {}
        loader: Any = data.train_dataloader() if data is not None else self.trainer.train_dataloader
        for batch in loader:
            moved = self.trainer.strategy.batch_to_device(batch, self.device)
            if position:
                data.load_state_dict(position)
            yield moved

    # -- sharded weights (trainer=fsdp): gathered in each call of `terms`; unsharded during validation, where ranks may
    # -- differ in their number of batches

    def configure_model(self) -> None:
        if self.device_mesh is not None:
            shard(self, self.device_mesh)
            register_fsdp_forward_method(self, "terms")
            self.frozen_rows.hook_again()

    def on_validation_epoch_start(self) -> None:
        unshard(self)

    def on_validation_epoch_end(self) -> None:
        reshard(self)

    # -- optimization --------------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        return optimizer_of(self.phases(), self.optimizer_settings, self.schedule, self.frozen_rows.restore)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Set the gradients of inactive phases to None, so that weight decay and momentum do not move their weights."""
        for phase in self.phases():
            if not phase.holds(self.global_step):
                for parameter in phase.module.parameters():
                    parameter.grad = None

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def trained_names(self) -> set[str]:
        """Return the names of the weights in a checkpoint. Default: all that require a gradient."""
        return {name for name, parameter in self.named_parameters() if parameter.requires_grad}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store weights of a plain CLIP in `state_dict`, for other programs, and in `training` those to resume from.

        They differ with WiSE, which interpolates `state_dict`, and with LoRA, which is merged into it. Tensors that
        both share are stored once.
        """
        trained = self.trained_names()
        weights, training = (
            {name: weight for name, weight in state.items() if name in trained}
            for state in (checkpoint["state_dict"], checkpoint.get("training", checkpoint["state_dict"]))
        )
        checkpoint["state_dict"], checkpoint["training"] = merge_adapters(self, weights), training
        checkpoint["batches_seen"] = self.batches_seen
        checkpoint["config_yaml"] = self.config_yaml

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = checkpoint.get(
            "training", checkpoint["state_dict"]
        )  # older files have only `state_dict`
        state, stored = self.state_dict(), checkpoint["state_dict"]
        shapes = {name: weight.shape for name, weight in stored.items()}
        trained = {name: state[name].shape for name in self.trained_names()}
        if wrong := {name for name, _ in shapes.items() ^ trained.items()}:
            raise ValueError(
                f"The checkpoint and this config train different weights ({len(wrong)} differ, e.g. {min(wrong)}). Set "
                "method and backbone as in the run that wrote the checkpoint; its `config_yaml` holds that config."
            )
        self.batches_seen = checkpoint["batches_seen"]


def check_choice(key: str, value: object, *choices: str | None) -> None:
    """Raise ValueError if `method.<key>` is not one of the choices."""
    if value not in choices:
        names = [choice or "null" for choice in choices]
        raise ValueError(f"method.{key} is {value}: choose {', '.join(names[:-1])} or {names[-1]}.")
