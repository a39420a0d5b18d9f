"""FFF: pairs that the data wrongly calls negatives are found and trained as positives (arXiv 2405.10286)."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from hashlib import blake2b
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from clipfix.functional.contrastive import many_positives_loss
from clipfix.functional.positives import Frozen, Positives, Thresholds, itself, mine, thresholds_for
from clipfix.functional.sigmoid import best_bias, sigmoid_loss
from clipfix.methods.base import Method, by_sample, check_choice
from clipfix.models.clip import Backbone
from clipfix.models.tokenizer import TokenizeBatch
from clipfix.training.precision import fp32_products
from clipfix.training.sharding import shared, unsharded

SAMPLED = 2048  # samples of the first batch from which counts become cosines
REASONS = ("image_text", "image_image", "text_text")  # conditions that promote a pair, as `Positives` names them
NOTHING = Thresholds(*[float("inf")] * 4)  # no cosine passes


class Known(NamedTuple):
    """What tells which of n samples belong together: a reference's features and thresholds, labels, or neither."""

    samples: int
    captions: int
    frozen: Frozen | None
    bars: Thresholds
    same: Int[Tensor, " n"] | None

    def rows(self, part: slice) -> "Known":
        return Known(
            len(range(*part.indices(self.samples))),
            self.captions,
            self.frozen and self.frozen.rows(part),
            self.bars,
            None if self.same is None else self.same[part],
        )


class Promotion(NamedTuple):
    """A pair that was mined: this image and that sample's caption, the three cosines, and which conditions held."""

    image: int
    sample: int
    caption: str
    image_text: float
    image_image: float
    text_text: float
    reasons: tuple[str, ...]


class FFF(Method):
    """Both towers learn from several captions an image, and from whatever else in the batch belongs to it.

    `texts` names the captions of an image that enter the loss. A frozen `reference` CLIP compares images and captions
    of the whole batch, all ranks together, and pairs above `thresholds` become positives (`functional.positives.mine`):
    cosines, or with `thresholds_are: extra` the number of positives an image that each condition may add, turned into
    cosines on the first batch. Captions are compared with captions by those named `compare`: among raw ones the same
    junk is found under many pictures. Without a `reference` the features are read from the training shards
    (`data.features`), and nothing is mined in validation; without `thresholds` nothing is mined at all. `same` names a
    text of which equal strings are known to mean the same thing, as cluster ids do: such samples are positives too.

    `control: shuffled` asks the reference about each sample's neighbour instead: as many pairs, but the wrong ones.
    `objective: sigmoid` is the paper's; `softmax` spreads cross-entropy over the same positives, the control that says
    what the sigmoid is worth. With one text, no thresholds and softmax this is plain contrastive fine-tuning.

    Source: FFF (arXiv 2405.10286), sections 3.2 to 3.4. No code was published; where the text leaves a choice, it is a
    key of the yaml.
    Departs: the offset is fitted on the first batch alone, all ranks joined, and not on several.
    """

    bars: Tensor

    def __init__(
        self,
        backbone: Backbone,
        reference: Backbone | None,
        objective: str,
        texts: Sequence[str],
        compare: str,
        same: str | None,
        thresholds_are: str,
        thresholds: dict[str, float] | None,
        control: str | None,
        mean_over: str,
        start_scale: float | None,
        start_bias: float | None,
        tile: int,
        optimizer: dict[str, Any],
        steps: int,
        warmup_steps: int,
    ):
        super().__init__(backbone, optimizer, steps, warmup_steps)
        check_choice("objective", objective, "sigmoid", "softmax")
        check_choice("thresholds_are", thresholds_are, "cosines", "extra")
        check_choice("control", control, None, "shuffled")
        check_choice("mean_over", mean_over, "images", "entries")
        if not texts:
            raise ValueError("method.texts is empty: name one or more of data.texts, as in method.texts=[captions].")
        if tile < 1:
            raise ValueError(f"method.tile is {tile}: score 1 or more samples at a time.")
        self.reference = reference.requires_grad_(False) if reference and thresholds else None
        self.objective, self.names, self.compare, self.same = objective, tuple(texts), compare, same
        self.mines, self.mean_over, self.control = thresholds is not None, mean_over, control
        bars = Thresholds(**{name: float(bar) for name, bar in thresholds.items()}) if thresholds else NOTHING
        self.extra = bars if thresholds_are == "extra" and thresholds else None
        self.start_bias, self.tile = start_bias, tile
        self.register_buffer("bars", torch.tensor(bars))
        compared = tuple(dict.fromkeys((*texts, compare))) if thresholds else tuple(texts)
        self.needs = replace(
            self.clip_needs(*texts),
            texts=tuple(dict.fromkeys((*compared, *([same] if same else [])))),
            features=self.mines and reference is None,
        )
        if self.reference is not None:
            encode = TokenizeBatch(self.reference.tokens, compared, key="reference_tokens")
            self.needs = replace(self.needs, encode=(*self.needs.encode, encode))
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
        if self.extra is not None and known.frozen is not None:
            bars = thresholds_for(known.frozen.rows(slice(SAMPLED)), self.extra, among=known.samples)
            self.bars.copy_(torch.tensor(bars))
            known = known._replace(bars=bars)
        if self.objective == "sigmoid" and self.start_bias is None:
            with unsharded(self):
                image, text = self.gather(self.images(self.backbone, batch)), self.gather(self.texts(batch))
            scale = self.scale
            shared(self.bias).copy_(best_bias(image, text, scale, partial(self.positives, known, known, 0), self.tile))

    def loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        image, text, scale = self.images(self.backbone, batch), self.texts(batch), self.scale
        known, first, rows = self.look(batch), self.rank * len(image), len(image)
        own = known.rows(slice(first, first + rows))
        counts: dict[str, Any] = defaultdict(int)  # tensors, so that no tile waits for the device
        all_text = self.gather(text)
        if self.objective == "sigmoid":
            positives = partial(self.positives, own, known, first, counts=counts)
            total = sigmoid_loss(image, all_text, scale, shared(self.bias), positives, self.tile)
            term = total / (rows if self.mean_over == "images" else rows * all_text[..., 0].numel())
        else:
            for_image = self.positives(own, known, first, slice(None), counts).flatten(1)
            for_text = self.positives(known, own, -first, slice(None)).flatten(1).T
            term = (
                many_positives_loss(image, all_text.flatten(0, 1), for_image, scale)
                + many_positives_loss(text.flatten(0, 1), self.gather(image), for_text, scale)
            ) / 2
        for name, count in counts.items():  # in samples, all captions of one counting 1, as `extra` does
            each = count / (rows * known.captions)
            self.note(f"positives/{name}_per_image", each)
            self.note(f"positives/{name}_percent", 100 * each / max(1, known.samples - 1))
        return {self.objective: term}

    # -- what trains --------------------------------------------------------------------------------------------------

    def images(self, clip: Backbone, batch: dict[str, Any]) -> Float[Tensor, "b d"]:
        return F.normalize(clip.encode_image(batch["image"]).float(), dim=-1)

    def texts(self, batch: dict[str, Any]) -> Float[Tensor, "b k d"]:
        """The captions of each image, in the order of `texts`."""
        return torch.cat(list(self.encode_texts(self.backbone, batch, self.names).values()), dim=1)

    def encode_texts(self, clip: Backbone, batch: dict[str, Any], names: Iterable[str]) -> dict[str, Tensor]:
        """By name of the text, [b, several, d] of unit norm, from one pass through the tower."""
        made = batch.get("tokens" if clip is self.backbone else "reference_tokens", {})
        tokens = {name: made[name] if name in made else clip.tokenize(batch[name]) for name in names}
        features = F.normalize(clip.encode_text(torch.cat(list(tokens.values()))).float(), dim=-1)
        parts = features.split([len(rows) for rows in tokens.values()])
        return {name: part.unflatten(0, (len(batch["image"]), -1)) for name, part in zip(tokens, parts, strict=True)}

    # -- what belongs together ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def look(self, batch: dict[str, Any], joined: bool = True) -> Known:
        """What is known of the joined batch, or of this rank's part alone, which asks nothing of other ranks."""
        gather = self.gather if joined else lambda rows: rows
        frozen = same = None
        if self.mines and (self.training or not self.needs.features):
            image, texts = self.reference_features(batch)
            text = torch.cat([texts[name] for name in self.names], dim=1)
            frozen = Frozen(gather(image), gather(text), gather(texts[self.compare].mean(dim=1)))
            if self.control == "shuffled":
                frozen = Frozen(*(rows.roll(1, dims=0) for rows in frozen))
        if self.same is not None:
            labels = [int.from_bytes(blake2b(text.encode(), digest_size=7).digest()) for text in batch[self.same]]
            same = gather(torch.tensor(labels, device=self.device))
        rows = len(batch["image"]) * (self.world_size if joined else 1)
        bars = Thresholds(*self.bars.tolist())  # here, once a step, and not for every tile: the device is waited for
        return Known(rows, sum(len(batch[name]) for name in self.names) // len(batch["image"]), frozen, bars, same)

    def reference_features(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Images [b, d], and by name of the text [b, several, d]: from the reference, or as the shards have them."""
        names = dict.fromkeys((*self.names, self.compare))
        if self.reference is None:
            found, rows = batch["features"], len(batch["image"])
            if absent := [name for name in names if name not in found]:
                raise ValueError(
                    f"The stored features are not of data.texts.{absent[0]}: run=annotate annotator=features again "
                    "with its json key in annotator.keys, or name a method.reference."
                )
            return found["image"], {name: found[name].unflatten(0, (rows, -1)) for name in names}
        self.reference.eval()
        return self.images(self.reference, batch), self.encode_texts(self.reference, batch, names)

    def positives(
        self, queries: Known, known: Known, first: int, part: slice, counts: dict[str, Any] | None = None
    ) -> Bool[Tensor, "b t k"]:
        """Positives among a part of the known samples, of queries that are known from `first` on; counted by reason."""
        known, first = known.rows(part), first - (part.start or 0)
        own = itself(queries.samples, known.samples, first, self.bars.device)
        found = own[..., None].expand(-1, -1, known.captions)
        reasons = {}
        if queries.same is not None and known.same is not None:
            reasons["same"] = ((queries.same[:, None] == known.same) & ~own)[..., None].expand_as(found)
        if queries.frozen is not None and known.frozen is not None:
            with fp32_products("highest"):
                mined: Positives = mine(queries.frozen, known.frozen, known.bars, first)
            reasons |= {name: getattr(mined, name) for name in REASONS}
        for mask in reasons.values():
            found = found | mask
        if counts is not None:
            for name, mask in reasons.items():
                counts[name] += mask.count_nonzero()
            counts["together"] += found.count_nonzero() - own.count_nonzero() * known.captions
        return found

    @torch.no_grad()
    def promoted(self, batch: dict[str, Any], at_most: int) -> list[Promotion]:
        """Pairs mined within this rank's part of the batch, a random choice of them where there are more."""
        frozen = self.look(batch, joined=False).frozen
        if frozen is None:
            return []
        frozen = Frozen(*(part.cpu() for part in frozen))
        found = mine(frozen, frozen, Thresholds(*self.bars.tolist()), first_row=0)
        entries = (found.any() & ~found.own).nonzero()
        chosen = torch.randperm(len(entries), generator=torch.Generator().manual_seed(0))[:at_most].sort().values
        by_name = zip(*(by_sample(batch, name) for name in self.names), strict=True)
        captions = [[text for texts in sample for text in texts] for sample in by_name]
        reasons = {name: getattr(found, name) for name in REASONS}
        return [
            Promotion(
                image=i,
                sample=j,
                caption=captions[j][c],
                image_text=(frozen.image[i] @ frozen.text[j, c]).item(),
                image_image=(frozen.image[i] @ frozen.image[j]).item(),
                text_text=(frozen.gist[i] @ frozen.gist[j]).item(),
                reasons=tuple(name for name, mask in reasons.items() if mask[i, j, c]),
            )
            for i, j, c in entries[chosen].tolist()
        ]
