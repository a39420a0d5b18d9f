"""Conditions of a diffusion model: visual tokens of CLIP, projected to its cross-attention space."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from clipfix.functional.patches import PatchRule, condition_from_tokens
from clipfix.models.clip import Backbone
from clipfix.models.convert import read
from clipfix.models.diffusion import Diffusion
from clipfix.training.phases import Phase
from clipfix.training.ranks import Ranks

PREFIX = "condition.projection."  # of its weights in checkpoints


class Condition(nn.Module, ABC):
    """A linear projection from CLIP's joint space to the cross-attention space of a diffusion model.

    Args:
        tokens: tokens of the cross-attention space for each visual token.
        steps: optimizer steps at the start in which the projection trains alone; 0 for none.
        lr: learning rate of the projection; None for the optimizer's.
    """

    null: Tensor  # [t, c], the condition of the empty text
    texts: tuple[str, ...] = ()  # names of the batch's texts that the projection learns from

    def __init__(self, tokens: int, steps: int, lr: float | None) -> None:
        super().__init__()
        if tokens < 1:
            raise ValueError(f"method.condition.tokens is {tokens}: set it to 1 or more.")
        self.tokens, self.steps, self.lr = tokens, steps, lr

    def attach(self, backbone: Backbone, diffusion: Diffusion, ranks: Ranks) -> None:
        """Create the projection between two models, with random weights.

        With zero weights, all tokens of a condition on the mean null text would start equal and stay equal.
        """
        self.ranks = ranks
        self.projection = nn.Linear(backbone.embed_dim, self.tokens * diffusion.condition_dim)
        # The null text never changes: one pass here instead of one in each step.
        self.register_buffer("null", diffusion.condition([""])[0].float(), persistent=False)

    @abstractmethod
    def forward(self, pooled: Float[Tensor, "b d"], patches: Float[Tensor, "b n d"]) -> Float[Tensor, "b m c"]:
        """Return the condition of each image.

        Args:
            pooled: image features in the joint space.
            patches: features of the patches in the joint space.
        """

    def phase(self, steps: int, caption_loss: Any) -> Phase:
        """Return the phase of a run of `steps` optimizer steps in which the projection trains.

        Args:
            steps: optimizer steps of the run.
            caption_loss: the loss of a phase that learns from captions.
        """
        return Phase(self, 0, steps, self.lr)

    def project(self, features: Float[Tensor, "b n d"], null_text: str) -> Float[Tensor, "b m c"]:
        """Return features of the joint space as tokens of the cross-attention space, added to the null text."""
        projected = self.projection(features).unflatten(-1, (self.tokens, -1)).flatten(1, 2)
        return condition_from_tokens(projected, self.null, null_text)


class VisualTokens(Condition):
    """The class token and some patches of each image; the projection learns from images.

    Args:
        patches: the rule that picks or averages patches; its tokens join the class token.
        null_text: `tokenwise` adds token i of the null text to visual token i; `mean` adds the mean null token to each.

    Raises:
        ValueError: when called with a number of patches that does not fit `patches` or `null_text`.

    Source: DIVA (arXiv 2407.20171), figure 3, and the authors' code. A first phase for the projection alone is
    GenHancer's (arXiv 2503.19480).
    """

    def __init__(self, patches: PatchRule, null_text: str, tokens: int, steps: int, lr: float | None) -> None:
        super().__init__(tokens, steps, lr)
        if null_text not in ("tokenwise", "mean"):
            raise ValueError(f"method.condition.null_text is {null_text}: choose tokenwise or mean.")
        self.patches, self.null_text = patches, null_text

    def forward(self, pooled: Float[Tensor, "b d"], patches: Float[Tensor, "b n d"]) -> Float[Tensor, "b m c"]:
        try:
            picked = self.patches(patches, self.ranks.sample)
        except ValueError as error:  # it begins with the name of the argument
            raise ValueError(f"method.condition.patches.{error}") from error
        try:
            return self.project(torch.cat([pooled[:, None], picked], dim=1), self.null_text)
        except ValueError as error:
            raise ValueError(f"method.condition.{error}") from error


class CaptionSpace(Condition):
    """The image embedding alone, through a projection that is trained on captions and then frozen.

    In a first phase the projection learns from caption features of the text tower. A projection that learned from
    images would use whatever the visual tower encodes already. One that learned from captions uses what the visual
    tower should encode, so the gradient of the diffusion model moves image features along directions that captions
    have. Captions have no patches.

    Args:
        weights: a pretrained projection: the checkpoint of a run, or its tensors as a .safetensors file. `steps` may
            then be 0. None: random weights.

    Source: ours.
    """

    def __init__(self, tokens: int, steps: int, lr: float | None, weights: str | None) -> None:
        super().__init__(tokens, steps, lr)
        if steps < 1 and weights is None:
            raise ValueError(
                f"method.condition.steps is {steps}: the projection learns from captions first, so set it to 1 or "
                "more, or set method.condition.weights to a pretrained projection."
            )
        self.weights = weights
        self.texts = ("captions",) if steps else ()

    def attach(self, backbone: Backbone, diffusion: Diffusion, ranks: Ranks) -> None:
        super().attach(backbone, diffusion, ranks)
        if self.weights is not None:
            self._load(self.weights)
        self.projection.requires_grad_(self.steps > 0)

    def _load(self, path: str) -> None:
        key = f"method.condition.weights is {path}"
        if not Path(path).is_file():
            raise ValueError(f"{key}: there is no such file.")
        state = read(Path(path))
        own = {name.removeprefix(PREFIX): tensor for name, tensor in state.items() if name.startswith(PREFIX)}
        shapes = {name: tuple(tensor.shape) for name, tensor in own.items()}
        expected = {name: tuple(tensor.shape) for name, tensor in self.projection.state_dict().items()}
        if shapes != expected:
            raise ValueError(
                f"{key}, which holds a projection of shapes {shapes or 'none'}, and this backbone, generator and "
                f"method.condition.tokens need {expected}: give the projection of a run with the same three."
            )
        self.projection.load_state_dict(own)

    def forward(self, pooled: Float[Tensor, "b d"], patches: Float[Tensor, "b n d"]) -> Float[Tensor, "b m c"]:
        return self.of_features(pooled)

    def of_features(self, features: Float[Tensor, "b d"]) -> Float[Tensor, "b m c"]:
        """Return the condition of images or captions, from their features in the joint space."""
        return self.project(self.without_gap(features)[:, None], "mean")

    def without_gap(self, features: Float[Tensor, "b d"]) -> Float[Tensor, "b d"]:
        """Return features without the modality gap: of unit norm, minus the mean of the joined batch, scaled.

        Source: image and text features of CLIP differ by a nearly constant vector (arXiv 2203.02053, section 4).
        """
        features = F.normalize(features.float(), dim=-1)
        return (features - self.ranks.gather(features).mean(0)) * features.shape[1] ** 0.5

    def phase(self, steps: int, caption_loss: Any) -> Phase:
        return Phase(self, 0, self.steps, self.lr, caption_loss)
