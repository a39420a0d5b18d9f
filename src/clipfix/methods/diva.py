"""DIVA: a frozen text-to-image diffusion model tells CLIP's visual tower what it missed (arXiv 2407.20171)."""

import copy
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from clipfix.functional.anchors import feature_drift, similarity_drift
from clipfix.functional.denoising import contrastive_denoising_loss, denoising_loss, logit_normal_timesteps
from clipfix.functional.patches import PATCH_RULES, Patches, condition_from_tokens
from clipfix.functional.views import random_crops
from clipfix.methods.base import Method, Stage, check_choice
from clipfix.models.adapters import trained_parts
from clipfix.models.clip import Backbone
from clipfix.models.diffusion import Diffusion


class DIVA(Method):
    """The visual tower learns to describe an image so well that a frozen diffusion model can denoise it.

    Trained: the visual tower, or what `train` names of it, and one linear projection from CLIP's joint space to the
    cross-attention space. The text tower and the whole diffusion model stay bit-identical. The tower runs once a batch,
    and all `draws` of noise and timestep share its tokens.

    Feedback alone has no reason to keep the tower where the text tower looks for it. Hence the switches of DIVA's
    successors: which `timesteps` are asked, `projection_steps` in which the projection finds its way before the tower
    moves, an `anchor` at the tower as it was, and captions beside the feedback (`caption_weight`). And ours:
    `projection_from: captions` learns the projection in stage one from captions, as the text tower puts them in the
    joint space, and rests it in stage two. Learned from images, it reads what the tower says; learned from captions,
    what the tower should say, so that the generator pulls it along directions that words have.

    Hence the controls as well: what a run with `control: shuffled` gains, each image conditioned on another's
    description, was not learned from the image; `control: off` with captions is the caption loss alone.

    `feedback: contrastive` is DCR: the U-Net's answer under an image's own condition has to lie nearer to the true
    noise and to the answer under an augmented view's condition than to those under other images' conditions. As in its
    code, gradients flow through every condition: own, view's and others'. `dcr.negatives` of n others mean n + 2 passes
    of the U-Net, and activations of as many, for the one of `denoising`. Captions have no augmented view, so stage one
    with `projection_from: captions` denoises.

    Source: DIVA (arXiv 2407.20171), equation 2 and figure 3; token rules from the authors' code. DCR (arXiv
    2603.04803), from its abstract and its authors' code.
    Departs: the draws weigh the same (see `denoising_loss`); the VAE sees the image itself, where the reference
    un-normalizes it with the constants of another data set. GenHancer (arXiv 2503.19480) trains its stages as two runs
    with a schedule each; here one run holds both. DCR takes all others of a rank's batch as negatives, where here a few
    of the joined batch are; its views are also flipped both ways and recoloured, which is left out because left, right,
    up and down are among the faults to be repaired, and colours too; its projection has two layers; it always compares
    with v, which is the `target` of the Stable Diffusion that it uses.
    """

    null: Tensor
    original: Backbone | None

    def __init__(
        self,
        backbone: Backbone,
        diffusion: Diffusion,
        patches: str,
        patch_amount: int | float | None,
        null_text: str,
        draws: int,
        timesteps: dict[str, Any],
        feedback: str,
        dcr: dict[str, Any],
        train: str,
        train_blocks: int | None,
        lora: dict[str, Any],
        checkpointing: bool,
        condition_tokens: int,
        projection_from: str,
        projection_steps: int,
        projection_lr: float | None,
        anchor: str | None,
        anchor_weight: float,
        caption_weight: float,
        control: str | bool | None,
        watch_every: int,
        optimizer: dict[str, Any],
        steps: int,
        warmup_steps: int,
    ):
        super().__init__(backbone, optimizer, steps, warmup_steps)
        self.control = "off" if control is False else control  # a bare `off` is false to yaml
        check_choice("null_text", null_text, "tokenwise", "mean")
        check_choice("timesteps.law", timesteps["law"], "uniform", "logit_normal")
        check_choice("feedback", feedback, "denoising", "contrastive")
        check_choice("train", train, "visual", "norms", "blocks", "lora")
        check_choice("projection_from", projection_from, "images", "captions")
        check_choice("anchor", anchor, None, "features", "similarities")
        check_choice("control", self.control, None, "shuffled", "off")
        if patches not in PATCH_RULES:
            raise ValueError(f"method.patches is {patches}: choose from {', '.join(PATCH_RULES)}.")
        rule, kind = PATCH_RULES[patches]
        if not isinstance(patch_amount, kind):
            raise ValueError(f"method.patch_amount is {patch_amount}: method.patches={patches} takes {kind.__name__}.")
        low, high = timesteps["range"] or (0, diffusion.num_timesteps)
        if not 0 <= low < high <= diffusion.num_timesteps:
            raise ValueError(
                f"method.timesteps.range is [{low}, {high}]: give its first timestep and the one after its last, "
                f"between 0 and the diffusion model's {diffusion.num_timesteps}."
            )
        if not 0 <= projection_steps <= steps:
            raise ValueError(f"method.projection_steps is {projection_steps}: set it between 0 and {steps}, the steps.")
        if projection_from == "captions" and (projection_steps == 0 or patches != "none"):
            raise ValueError(
                "method.projection_from=captions learns the projection in stage one, from whole captions: set "
                "method.projection_steps above 0, and method.patches=none, as a patch has no caption."
            )
        if condition_tokens < 1:
            raise ValueError(f"method.condition_tokens is {condition_tokens}: set it to 1 or more.")
        if feedback == "contrastive":
            check_dcr(**dcr)
        if self.control == "off" and (projection_steps or not caption_weight):
            raise ValueError(
                "method.control=off leaves no feedback to train with, and no projection: set method.caption_weight "
                "above 0 and method.projection_steps=0."
            )
        self.diffusion = diffusion
        self.pick_patches = partial(rule, draw=self.draw, amount=patch_amount)
        self.null_text = null_text
        self.draws = draws
        self.timesteps, self.timestep_range = timesteps, (low, high)
        self.contrastive, self.dcr = feedback == "contrastive", dcr
        self.condition_tokens = condition_tokens
        self.projection_from = projection_from
        self.projection_steps, self.projection_lr = projection_steps, projection_lr
        self.anchor, self.anchor_weight, self.caption_weight = anchor, anchor_weight, caption_weight
        self.watch_every = watch_every
        short = ("caption",) if caption_weight or anchor == "similarities" else ()
        size = max(backbone.image_size, diffusion.image_size)
        self.needs = replace(
            self.clip_needs(*short, *(("captions",) if projection_from == "captions" else ())),
            image_size=size,
            latents=partial(diffusion.latents_of, size),
        )

        # Random, as from zero all `condition_tokens` on the mean null text would start alike, and stay alike for ever.
        self.visual_proj = nn.Linear(backbone.embed_dim, condition_tokens * diffusion.condition_dim)
        self.visual_proj.requires_grad_(self.control != "off")
        backbone.requires_grad_(False)
        # The original shares the text tower, which never trains. Frozen, it stays out of checkpoints.
        self.original = None
        if anchor or watch_every:
            self.original = copy.deepcopy(backbone, {id(backbone.text): backbone.text})
            self.original.visual.eval()
        for part in trained_parts(backbone.visual, train, train_blocks, lora):
            part.requires_grad_(True)
        if checkpointing:
            backbone.checkpoint_visual()
        # The null text never changes: one pass here instead of one a step.
        self.register_buffer("null", diffusion.condition([""])[0].float(), persistent=False)

    def stages(self) -> list[Stage]:
        """The projection, then the tower; learned from images, the projection goes on beside the tower."""
        end = self.projection_steps if self.projection_from == "captions" else self.steps
        projection = Stage(self.visual_proj, 0, end, self.projection_lr)
        return [projection, Stage(self.backbone, self.projection_steps, self.steps)]

    def loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        if self.projection_from == "captions" and self.global_step < self.projection_steps:
            condition = self.condition_of_captions(batch)
            denoising = self.feedback(batch["image"], condition, None, batch.get("latents"), shuffled=False)
            # DDP waits for a gradient of every weight, so the resting tower hands in zeros. FSDP2 waits for none, and
            # has split what no forward gathers.
            trained = [weight for weight in self.backbone.parameters() if weight.requires_grad]
            idle = sum(weight.sum() for weight in trained if not isinstance(weight, DTensor))
            return {"denoising": denoising + 0 * idle}
        pooled, patches = self.backbone.visual_tokens(batch["image"])
        image = F.normalize(pooled.float(), dim=-1)
        text = self.texts(batch, "caption") if "caption" in self.needs.texts else None
        terms = {}
        if self.control != "off":
            condition = self.condition(pooled, patches)
            view = self.condition_of_views(batch["image"]) if self.contrastive else None
            feedback = self.feedback(batch["image"], condition, view, batch.get("latents"), self.control == "shuffled")
            terms["contrastive" if self.contrastive else "denoising"] = feedback
        if self.caption_weight and text is not None:
            terms["caption"] = self.caption_weight * self.contrast(image, text, label_smoothing=0.0)
        if self.original is not None and (self.anchor or self.watching):
            with torch.no_grad():
                original = F.normalize(self.original.encode_image(batch["image"]).float(), dim=-1)
            if self.watching:
                self.note("drift/features", feature_drift(image, original).item())
            if self.anchor:
                terms["anchor"] = self.anchor_weight * self.drift(image, original, text)
        return terms

    # -- feedback -----------------------------------------------------------------------------------------------------

    def condition(self, pooled: Float[Tensor, "b d"], patches: Patches) -> Float[Tensor, "b m c"]:
        """What the diffusion model is told of each image."""
        if self.projection_from == "captions":
            return self.project(self.without_gap(pooled)[:, None])
        return self.project(torch.cat([pooled[:, None], self.pick_patches(patches)], dim=1))

    def condition_of_views(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b m c"]:
        """What the diffusion model is told of an augmented view of each image; not a flipped one: left is not right."""
        uniform = self.draw(torch.rand, rows=len(images), shape=(4,))
        views = random_crops(images, uniform, self.dcr["crop_area"], self.dcr["crop_ratio"])
        return self.condition(*self.backbone.visual_tokens(views))

    def condition_of_captions(self, batch: dict[str, Any]) -> Float[Tensor, "b m c"]:
        """What the diffusion model is told of each image by its captions, averaged in the joint space."""
        with torch.no_grad():
            text = self.texts(batch, "captions").unflatten(0, (len(batch["image"]), -1)).mean(1)
        return self.project(self.without_gap(text)[:, None])

    def without_gap(self, features: Float[Tensor, "b d"]) -> Float[Tensor, "b d"]:
        """Images and texts where both can be: unit norm, less the mean of the joined batch, of unit scale again.

        Source: CLIP's two kinds of features lie apart, and nearly by a constant (arXiv 2203.02053, section 4).
        """
        features = F.normalize(features.float(), dim=-1)
        return (features - self.gather(features).mean(0)) * features.shape[1] ** 0.5

    def project(self, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b m c"]:
        """Tokens of the joint space, each as `condition_tokens` of the cross-attention space."""
        projected = self.visual_proj(tokens).unflatten(-1, (self.condition_tokens, -1)).flatten(1, 2)
        return condition_from_tokens(projected, self.null, self.null_text)

    def feedback(
        self,
        images: Float[Tensor, "b 3 h w"],
        condition: Float[Tensor, "b m c"],
        view: Float[Tensor, "b m c"] | None,
        latents: Float[Tensor, "b z y x"] | None,
        shuffled: bool,
    ) -> Float[Tensor, ""]:
        """The denoising loss or, with the conditions of augmented views, the contrastive one.

        Told of each image or, `shuffled`, of another one; `latents` where they are known.
        """
        latents = self.diffusion.encode(images) if latents is None else latents
        rows, *shape = latents.shape
        noise = self.draw(torch.randn, rows=rows, shape=(self.draws, *shape)).flatten(0, 1)
        timesteps = self.draw_timesteps(rows).flatten()
        latents = latents.repeat_interleave(self.draws, dim=0)
        noisy, target = (make(latents, noise, timesteps) for make in (self.diffusion.add_noise, self.diffusion.target))

        def predict(told: Float[Tensor, "b t c"]) -> Float[Tensor, "n z y x"]:
            return self.diffusion.predict(noisy, timesteps, told.repeat_interleave(self.draws, dim=0))

        if self.watching:
            null = self.null.expand(rows, -1, -1)
            with torch.no_grad():
                for name, told in {"right": condition, "shuffled": self.of_others(condition), "null": null}.items():
                    self.note(f"denoising/{name}", denoising_loss(predict(told), target).item())
        if shuffled:
            condition, view = self.of_others(condition), None if view is None else self.of_others(view)
        if view is None:
            return denoising_loss(predict(condition), target)
        # Less than half a batch further on: told shuffled, half a batch on, the right condition is never a negative.
        count = self.dcr["negatives"]
        others = [self.of_others(condition, n, 2 * (count + 1)) for n in range(1, count + 1)]
        positives = torch.stack([target, predict(view)], dim=1)
        negatives = torch.stack([predict(other) for other in others], dim=1)
        return contrastive_denoising_loss(predict(condition), positives, negatives, self.dcr["temperature"])

    def draw_timesteps(self, rows: int) -> Int[Tensor, "b k"]:
        """This rank's timesteps, `draws` an image."""
        if self.timesteps["law"] == "uniform":
            return self.draw(torch.randint, *self.timestep_range, rows=rows, shape=(self.draws,))
        normal = self.draw(torch.randn, rows=rows, shape=(self.draws,))
        return logit_normal_timesteps(normal, self.timesteps["mean"], self.timesteps["sd"], *self.timestep_range)

    def of_others(self, condition: Float[Tensor, "b m c"], part: int = 1, parts: int = 2) -> Float[Tensor, "b m c"]:
        """For each image the condition of the one `part / parts` of a batch further on, all ranks together.

        Half a batch is as far away as can be: where look-alikes follow each other, the next image would be almost the
        right one.
        """
        joined = self.gather(condition)
        if self.training and len(joined) < parts:  # the last batch of a validation split may be that short
            raise ValueError(
                f"A batch of {len(joined)} has too few other images to take conditions from: raise data.batch_size, so "
                f"that all ranks together have {parts} images, or lower method.dcr.negatives with feedback=contrastive."
            )
        return joined.roll(-(len(joined) * part // parts), dims=0)[self.rank * len(condition) :][: len(condition)]

    @property
    def watching(self) -> bool:
        """Whether this batch is looked at more closely; the logger shows what was seen until the next look."""
        return self.training and self.watch_every > 0 and self.batches_seen % self.watch_every == 0

    # -- what keeps CLIP where it was ---------------------------------------------------------------------------------

    def texts(self, batch: dict[str, Any], name: str) -> Float[Tensor, "b d"]:
        """Captions in the joint space, of unit norm; no gradient reaches their tower."""
        return F.normalize(self.backbone.encode_text(self.tokens(batch, name)).float(), dim=-1)

    def drift(
        self, image: Float[Tensor, "b d"], original: Float[Tensor, "b d"], text: Float[Tensor, "b d"] | None
    ) -> Float[Tensor, ""]:
        """How far the visual tower has moved, as `anchor` sees it."""
        if text is None or self.anchor == "features":
            return feature_drift(image, original)
        return similarity_drift(image, original, self.gather(text), self.scale)


def check_dcr(temperature: float, negatives: int, crop_area: list[float], crop_ratio: list[float]) -> None:
    """Refuses what contrastive feedback cannot work with."""
    if temperature <= 0 or negatives < 1:
        raise ValueError(
            f"method.dcr has temperature {temperature} and negatives {negatives}: set the one above 0, the other to 1 "
            "or more."
        )
    if not 0 < crop_area[0] <= crop_area[1] <= 1 or not 0 < crop_ratio[0] <= crop_ratio[1]:
        raise ValueError(
            f"method.dcr has crop_area {crop_area} and crop_ratio {crop_ratio}: give each its least and greatest, "
            "areas above 0 and up to 1, ratios above 0."
        )
