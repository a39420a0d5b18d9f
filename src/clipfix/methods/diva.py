"""DIVA: trains CLIP's visual tower with feedback from a frozen text-to-image diffusion model (arXiv 2407.20171)."""

from dataclasses import replace
from functools import partial
from typing import Any, Unpack

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from clipfix.functional.denoising import denoising_loss
from clipfix.methods.base import Method
from clipfix.models.clip import Backbone
from clipfix.models.diffusion import Diffusion
from clipfix.parts.anchor import Anchor
from clipfix.parts.condition import CaptionSpace, Condition
from clipfix.parts.feedback import Feedback, Predict, shifted_condition
from clipfix.parts.timesteps import Timesteps
from clipfix.parts.trainable import Trainable
from clipfix.training.phases import Phase, Training


class DIVA(Method):
    """The visual tower is trained so that a frozen diffusion model, conditioned on its tokens, can denoise the image.

    The visual tower, or a part of it, and a projection from CLIP's joint space to the cross-attention space are
    trained. The text tower and the diffusion model stay bit-identical. The tower runs once for each batch, and all
    draws of noise and timestep share its tokens.

    Feedback alone lets image features drift away from the text tower. Three options limit that: an anchor, a caption
    loss, and a first phase in which the projection trains alone. Two controls measure the effect of the feedback:
    `shuffled` conditions each image on another one, and `feedback=None` trains with the caption loss alone.

    Args:
        diffusion: the frozen diffusion model.
        condition: computes the condition of each image, `VisualTokens` (paper) or `CaptionSpace`.
        timesteps: distribution of timesteps, and number of draws for each image.
        feedback: loss of the diffusion model, `Denoising` (paper) or `Contrastive` (DCR); None for no feedback.
        trainable: the weights of the visual tower that train.
        anchor: keeps the tower near the pretrained one; None (paper) for no anchor.
        caption_weight: factor on a contrastive loss with the batch's captions; 0 (paper) for none.
        shuffled: take each image's condition from another image. The control.

    Source: DIVA (arXiv 2407.20171), equation 2 and figure 3.
    Departs: all draws have the same weight (see `denoising_loss`). The VAE gets the original image; the authors' code
    reverses CLIP's normalization with the constants of another data set. GenHancer (arXiv 2503.19480) trains its stages
    as two runs; here they are phases of one run, each with its own schedule.
    """

    def __init__(
        self,
        backbone: Backbone,
        diffusion: Diffusion,
        condition: Condition,
        timesteps: Timesteps,
        feedback: Feedback | None,
        trainable: Trainable,
        anchor: Anchor | None,
        caption_weight: float,
        shuffled: bool,
        **training: Unpack[Training],
    ):
        super().__init__(backbone, **training)
        self.diffusion, self.timesteps, self.feedback = diffusion, timesteps, feedback
        self.caption_weight, self.shuffled = caption_weight, shuffled
        timesteps.bounds(diffusion.num_timesteps)
        if not 0 <= condition.steps <= self.steps:
            raise ValueError(
                f"method.condition.steps is {condition.steps}: set it between 0 and method.steps ({self.steps})."
            )
        if feedback is None and (condition.steps or not caption_weight):
            raise ValueError(
                "method.feedback is null, so the projection, and without captions the tower, would have no loss: set "
                "method.caption_weight above 0 and method.condition.steps=0."
            )
        # The order of the next lines must not change: it is the order in which random weights are drawn.
        condition.attach(backbone, diffusion, self.ranks)
        if feedback is None:
            condition.requires_grad_(False)
        self.condition = condition
        backbone.requires_grad_(False)
        if anchor is not None:
            anchor.attach(backbone, self.ranks)
        self.anchor = anchor
        trainable.unfreeze(backbone)
        caption = ("caption",) if caption_weight or (anchor is not None and anchor.texts) else ()
        size = max(backbone.image_size, diffusion.image_size)
        self.needs = replace(
            self.clip_needs(*caption, *condition.texts), image_size=size, latents=partial(diffusion.latents_of, size)
        )

    def phases(self) -> list[Phase]:
        """Return the phase of the projection and that of the tower. They overlap with `VisualTokens`."""
        projection = self.condition.phase(self.steps, self.caption_loss)
        return [projection, Phase(self.backbone, self.condition.steps, self.steps)]

    def caption_loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Return the denoising loss under the captions of each image, from which `CaptionSpace` learns."""
        predict, target = self.add_noise(batch)
        return {"denoising": denoising_loss(predict(self.condition_of_captions(batch)), target)}

    def loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        pooled, patches = self.backbone.visual_tokens(batch["image"])
        image = F.normalize(pooled.float(), dim=-1)
        text = self.texts(batch, "caption") if "caption" in self.needs.texts else None
        terms = {}
        if self.feedback is not None:
            terms[self.feedback.name] = self.feedback_loss(self.feedback, batch, self.condition(pooled, patches))
        if self.caption_weight and text is not None:
            terms["caption"] = self.caption_weight * self.contrast(image, text, label_smoothing=0.0)
        if self.anchor is not None:
            terms["anchor"] = self.anchor(batch["image"], image, text, self.scale)
        return terms

    def feedback_loss(
        self, feedback: Feedback, batch: dict[str, Any], condition: Float[Tensor, "b m c"]
    ) -> Float[Tensor, ""]:
        """Return the feedback on the conditions of a batch (equation 2)."""
        views = feedback.views(batch["image"], self.ranks)
        view = None if views is None else self.condition(*self.backbone.visual_tokens(views))
        predict, target = self.add_noise(batch)
        if self.shuffled:
            condition = shifted_condition(condition, self.ranks)
            view = None if view is None else shifted_condition(view, self.ranks)
        return feedback.loss(predict, target, condition, view, self.ranks)

    def add_noise(self, batch: dict[str, Any]) -> tuple[Predict, Float[Tensor, "n z y x"]]:
        """Draw noise and timesteps for the latents of each image.

        Returns:
            the diffusion model's prediction as a function of the condition [b, m, c], and its target. Both have
            n = b * draws rows; the draws of an image are adjacent.
        """
        latents = batch["latents"] if "latents" in batch else self.diffusion.encode(batch["image"])
        (rows, *shape), draws = latents.shape, self.timesteps.draws
        noise = self.ranks.sample(torch.randn, rows=rows, shape=(draws, *shape)).flatten(0, 1)
        timesteps = self.timesteps.sample(rows, self.diffusion.num_timesteps, self.ranks).flatten()
        latents = latents.repeat_interleave(draws, dim=0)
        noisy = self.diffusion.add_noise(latents, noise, timesteps)
        target = self.diffusion.target(latents, noise, timesteps)

        def predict(condition: Float[Tensor, "b m c"]) -> Float[Tensor, "n z y x"]:
            return self.diffusion.predict(noisy, timesteps, condition.repeat_interleave(draws, dim=0))

        return predict, target

    def texts(self, batch: dict[str, Any], name: str) -> Float[Tensor, "b d"]:
        """Return features of captions, of unit norm. The text tower is frozen."""
        return F.normalize(self.backbone.encode_text(self.tokens(batch, name)).float(), dim=-1)

    @torch.no_grad()
    def mean_captions(self, batch: dict[str, Any]) -> Float[Tensor, "b d"]:
        """Return the mean feature of the captions of each image."""
        return self.texts(batch, "captions").unflatten(0, (len(batch["image"]), -1)).mean(1)

    def condition_of_captions(self, batch: dict[str, Any]) -> Float[Tensor, "b m c"]:
        """Return the condition of each image, computed from its captions."""
        assert isinstance(self.condition, CaptionSpace)
        return self.condition.of_features(self.mean_captions(batch))

    @torch.no_grad()
    def denoising_errors(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Return the denoising loss under each image's own condition, another image's, and the null text.

        In a phase that learns from captions, the conditions are computed from captions.
        """
        if self.condition.texts and self.global_step < self.condition.steps:
            right = self.condition_of_captions(batch)
        else:
            right = self.condition(*self.backbone.visual_tokens(batch["image"]))
        predict, target = self.add_noise(batch)
        null = self.condition.null.expand(len(right), -1, -1)
        conditions = {"right": right, "shuffled": shifted_condition(right, self.ranks), "null": null}
        return {name: denoising_loss(predict(condition), target) for name, condition in conditions.items()}
