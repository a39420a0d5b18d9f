"""FFF: pairs that the data wrongly calls negatives are found and trained as positives (arXiv 2405.10286)."""

from collections import Counter
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from clipfix.backbone import Backbone
from clipfix.functional.contrastive import many_positives_loss
from clipfix.functional.positives import Frozen, Positives, Thresholds, mine, thresholds_for
from clipfix.functional.sigmoid import best_bias, sigmoid_loss
from clipfix.methods.base import Method

SAMPLED = 2048  # samples of the first batch from which counts become cosines


class FFF(Method):
    """Both towers learn from several captions an image, and from whatever else in the batch belongs to it.

    A frozen `reference` CLIP compares images and captions of the whole batch, all ranks together, and pairs above
    `thresholds` become positives (`functional.positives.mine`): cosines, or with `thresholds_are: extra` the number of
    positives an image that each condition may add, turned into cosines on the first batch. Captions are compared with
    captions by `gist`: `captions`, the pseudo-captions, or `caption`, the raw ones, among which the same junk is found
    under many pictures.

    `objective: sigmoid` is the paper's; `softmax` spreads cross-entropy over the same positives, the control that says
    what the sigmoid is worth.

    Source: FFF (arXiv 2405.10286), sections 3.2 to 3.4. No code was published; where the text leaves a choice, it is a
    key of the yaml.
    """

    reads = ("caption", "captions")
    bars: Tensor

    def __init__(
        self,
        backbone: Backbone,
        reference: Backbone,
        objective: str,
        keep_raw: bool,
        gist: str,
        thresholds_are: str,
        thresholds: dict[str, float],
        mean_over: str,
        start_scale: float | None,
        start_bias: float | None,
        tile: int,
        optimizer: dict[str, Any],
        steps: int,
        warmup_steps: int,
    ):
        super().__init__(backbone, optimizer, steps, warmup_steps)
        for key, value, choices in (
            ("objective", objective, ("sigmoid", "softmax")),
            ("gist", gist, ("captions", "caption")),
            ("thresholds_are", thresholds_are, ("cosines", "extra")),
            ("mean_over", mean_over, ("images", "entries")),
        ):
            if value not in choices:
                raise ValueError(f"method.{key} is {value}: choose {' or '.join(choices)}.")
        if tile < 1:
            raise ValueError(f"method.tile is {tile}: score 1 or more samples at a time.")
        self.reference = reference.requires_grad_(False)
        self.objective, self.gist, self.mean_over = objective, gist, mean_over
        self.names = ("captions", "caption") if keep_raw else ("captions",)
        self.extra = Thresholds(**thresholds) if thresholds_are == "extra" else None
        self.start_bias, self.tile = start_bias, tile
        self.register_buffer("bars", torch.tensor(Thresholds(**thresholds)))
        backbone.requires_grad_(True)
        if start_scale is not None:
            backbone.logit_scale.data.fill_(start_scale).log_()
        self.bias = nn.Parameter(torch.tensor(start_bias or 0.0), requires_grad=objective == "sigmoid")

    def trained_names(self) -> set[str]:
        """The cosines found on the first batch belong into the checkpoint, though no gradient reaches them."""
        return super().trained_names() | {"bars"}

    @torch.no_grad()
    def on_train_batch_start(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Before the first step: thresholds from counts, and the offset that suits the model as it is."""
        if self.batches_seen > 0:
            return
        known = self.look(batch)
        if self.extra is not None:
            self.bars.copy_(torch.tensor(thresholds_for(known.rows(slice(SAMPLED)), self.extra)))
        if self.objective == "sigmoid" and self.start_bias is None:
            image, text = self.gather(self.images(self.backbone, batch)), self.gather(self.texts(batch))
            scale = self.backbone.logit_scale.exp()
            self.bias.copy_(best_bias(image, text, scale, partial(self.positives, known, known, 0), self.tile))

    def loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        image, text, scale = self.images(self.backbone, batch), self.texts(batch), self.backbone.logit_scale.exp()
        known, first, rows = self.look(batch), self.rank * len(image), len(image)
        own = known.rows(slice(first, first + rows))
        counts: Counter[str] = Counter()
        all_text = self.gather(text)
        if self.objective == "sigmoid":
            positives = partial(self.positives, own, known, first, counts=counts)
            total = sigmoid_loss(image, all_text, scale, self.bias, positives, self.tile)
            term = total / (rows if self.mean_over == "images" else rows * all_text[..., 0].numel())
        else:
            for_image = self.positives(own, known, first, slice(None), counts).flatten(1)
            for_text = self.positives(known, own, -first, slice(None)).flatten(1).T
            term = (
                many_positives_loss(image, all_text.flatten(0, 1), for_image, scale)
                + many_positives_loss(text.flatten(0, 1), self.gather(image), for_text, scale)
            ) / 2
        for name, count in counts.items():
            self.note(f"positives/{name}_per_image", float(count) / rows)
        return {self.objective: term}

    def images(self, clip: Backbone, batch: dict[str, Any]) -> Float[Tensor, "b d"]:
        return F.normalize(clip.encode_image(batch["image"]).float(), dim=-1)

    def texts(self, batch: dict[str, Any]) -> Float[Tensor, "b k d"]:
        """The captions of each image, the raw one last if it is kept."""
        return torch.cat(list(self.encode_texts(self.backbone, batch, self.names).values()), dim=1)

    def encode_texts(self, clip: Backbone, batch: dict[str, Any], names: Iterable[str]) -> dict[str, Tensor]:
        """By name of the text, [b, several, d] of unit norm, from one pass through the tower."""
        texts = {name: batch[name] for name in names}
        tokens = clip.tokenize([text for several in texts.values() for text in several])
        features = F.normalize(clip.encode_text(tokens).float(), dim=-1)
        parts = features.split([len(several) for several in texts.values()])
        return {name: part.unflatten(0, (len(batch["image"]), -1)) for name, part in zip(texts, parts, strict=True)}

    @torch.no_grad()
    def look(self, batch: dict[str, Any]) -> Frozen:
        """What the reference says of the joined batch."""
        self.reference.eval()
        image = self.images(self.reference, batch)
        texts = self.encode_texts(self.reference, batch, (*self.names, self.gist))
        text = torch.cat([texts[name] for name in self.names], dim=1)
        return Frozen(self.gather(image), self.gather(text), self.gather(texts[self.gist].mean(dim=1)))

    def positives(
        self, queries: Frozen, known: Frozen, first: int, part: slice, counts: Counter[str] | None = None
    ) -> Bool[Tensor, "b t k"]:
        """Positives among a part of the known samples, of queries that are known from `first` on; counted by reason."""
        found: Positives = mine(queries, known.rows(part), Thresholds(*self.bars.tolist()), first - (part.start or 0))
        if counts is not None:
            for name in ("by_pair", "by_image", "by_text"):
                counts[name] += int(getattr(found, name).sum())
        return found.any()
