"""Mining: positives among the unpaired images and captions of a batch."""

from collections.abc import Iterable, Sequence
from hashlib import blake2b
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from clipfix.data.texts import by_sample
from clipfix.functional.positives import Positives, ReferenceFeatures, Thresholds, mine, same_samples, thresholds_for
from clipfix.models.clip import Backbone
from clipfix.models.tokenizer import TokenizeBatch
from clipfix.training.precision import fp32_products
from clipfix.training.ranks import Ranks

MAX_SAMPLES = 2048  # samples of the first batch that are used to turn counts into cosines
REASONS = ("image_text", "image_image", "text_text")  # the conditions of mining, fields of `Positives`
NO_POSITIVES = Thresholds(*[float("inf")] * 4)  # no cosine is above these


class Cosines:
    """Thresholds as cosines of the reference: see `mine`. They suit one reference only."""

    counts: Thresholds | None = None

    def __init__(self, image_text: float, supported: float, image_image: float, text_text: float) -> None:
        self.cosines = Thresholds(*map(float, (image_text, supported, image_image, text_text)))


class Counts:
    """Thresholds as the number of positives for each image that each condition alone may add.

    They are turned into cosines on the first batch (`Mining.fit`).
    """

    def __init__(self, image_text: float, supported: float, image_image: float, text_text: float) -> None:
        self.cosines = self.counts = Thresholds(*map(float, (image_text, supported, image_image, text_text)))


class Samples(NamedTuple):
    """n samples of a batch, with all that mining needs of them."""

    size: int  # n
    captions: int  # captions of each sample, k
    features: ReferenceFeatures | None
    thresholds: Thresholds
    labels: Int[Tensor, " n"] | None

    def rows(self, part: slice) -> "Samples":
        """Return some of the samples."""
        return Samples(
            len(range(*part.indices(self.size))),
            self.captions,
            self.features and self.features.rows(part),
            self.thresholds,
            None if self.labels is None else self.labels[part],
        )


class Promotion(NamedTuple):
    """A mined pair: an image and the caption of another sample, with three cosines and the conditions that it meets."""

    image: int
    sample: int
    caption: str
    image_text: float
    image_image: float
    text_text: float
    reasons: tuple[str, ...]


class Mining(nn.Module):
    """Finds positives with the features of a frozen reference CLIP, with labels, or with both.

    Args:
        reference: the frozen CLIP. None: its features are read from the training shards (`data.features`), and
            nothing is mined in validation.
        thresholds: `Cosines` or `Counts`; None mines nothing.
        compare: name of the text by which captions are compared with captions. Raw captions are a poor choice,
            because many images share the same meaningless one.
        same: name of a text that is a label, such as a cluster id: samples with equal strings are positives. None
            for no labels.
        shuffled: take the reference's features of each sample from the next sample, so that as many pairs are mined,
            but wrong ones. The control of mining.

    Source: FFF (arXiv 2405.10286), sections 3.2 and 3.3. No code was published.
    """

    cosines: Tensor

    def __init__(
        self,
        reference: Backbone | None,
        thresholds: Cosines | Counts | None,
        compare: str,
        same: str | None,
        shuffled: bool,
    ) -> None:
        super().__init__()
        self.reference = reference.requires_grad_(False) if reference and thresholds else None
        self.from_shards = thresholds is not None and reference is None
        self.active = thresholds is not None
        self.counts = thresholds.counts if thresholds else None
        self.compare, self.same, self.shuffled = compare, same, shuffled
        self.register_buffer("cosines", torch.tensor(thresholds.cosines if thresholds else NO_POSITIVES))

    def attach(self, names: Sequence[str], ranks: Ranks) -> None:
        """Set the names of the texts that are trained on, and the ranks that share a batch."""
        self.names, self.ranks = tuple(names), ranks

    # -- what a batch must contain ------------------------------------------------------------------------------------

    @property
    def encoded(self) -> tuple[str, ...]:
        """Names of the texts that the reference encodes."""
        return tuple(dict.fromkeys((*self.names, self.compare))) if self.active else ()

    @property
    def texts(self) -> tuple[str, ...]:
        """Names of the texts that mining reads."""
        return (*self.encoded, *([self.same] if self.same else []))

    @property
    def encode(self) -> tuple[TokenizeBatch, ...]:
        """Tokenization for the reference, run in the loader's workers."""
        if self.reference is None:
            return ()
        return (TokenizeBatch(self.reference.tokens, self.encoded, key="reference_tokens"),)

    # -- features and labels of a batch -------------------------------------------------------------------------------

    @torch.no_grad()
    def samples(self, batch: dict[str, Any], joined: bool = True) -> Samples:
        """Return the samples of the joined batch; if `joined` is false, those of this rank alone."""
        gather = self.ranks.gather if joined else lambda rows: rows
        features = labels = None
        if self.active and (self.training or not self.from_shards):
            image, texts = self.reference_features(batch)
            text = torch.cat([texts[name] for name in self.names], dim=1)
            features = ReferenceFeatures(gather(image), gather(text), gather(texts[self.compare].mean(dim=1)))
            if self.shuffled:
                features = ReferenceFeatures(*(rows.roll(1, dims=0) for rows in features))
        if self.same is not None:
            numbers = [int.from_bytes(blake2b(text.encode(), digest_size=7).digest()) for text in batch[self.same]]
            labels = gather(torch.tensor(numbers, device=self.cosines.device))
        size = len(batch["image"]) * (self.ranks.size if joined else 1)
        captions = sum(len(batch[name]) for name in self.names) // len(batch["image"])
        # `.tolist()` synchronizes with the device: here once in a step, and not once in a tile.
        return Samples(size, captions, features, Thresholds(*self.cosines.tolist()), labels)

    def reference_features(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the reference's features of images [b, d], and of each text by name [b, k, d], of unit norm.

        Raises:
            ValueError: if the stored features lack one of the texts.
        """
        names = dict.fromkeys((*self.names, self.compare))
        if self.reference is None:
            stored, rows = batch["features"], len(batch["image"])
            if absent := [name for name in names if name not in stored]:
                raise ValueError(
                    f"data.features has no features of data.texts.{absent[0]}: run=annotate annotator=features again "
                    "with its json key in annotator.keys, or set method.mining.reference."
                )
            return stored["image"], {name: stored[name].unflatten(0, (rows, -1)) for name in names}
        self.reference.eval()
        texts = text_features(self.reference, batch, names, "reference_tokens")
        return image_features(self.reference, batch), texts

    def fit(self, samples: Samples) -> Samples:
        """Turn counts into cosines, if the thresholds are counts; return the samples with these cosines."""
        if self.counts is None or samples.features is None:
            return samples
        cosines = thresholds_for(samples.features.rows(slice(MAX_SAMPLES)), self.counts, among=samples.size)
        self.cosines.copy_(torch.tensor(cosines))
        return samples._replace(thresholds=cosines)

    # -- pairs --------------------------------------------------------------------------------------------------------

    def positives(
        self, queries: Samples, samples: Samples, first: int, part: slice, counts: dict[str, Any] | None = None
    ) -> Bool[Tensor, "b t k"]:
        """Return which captions of a slice of the samples are positives of each query.

        Args:
            queries: some of the samples.
            samples: all samples of the batch.
            first: query i is sample `first + i`.
            part: the slice of the samples.
            counts: a dictionary to which the number of positives is added, by reason; None to count nothing.
        """
        samples, first = samples.rows(part), first - (part.start or 0)
        same = same_samples(queries.size, samples.size, first, self.cosines.device)
        positives = same[..., None].expand(-1, -1, samples.captions)
        reasons = {}
        if queries.labels is not None and samples.labels is not None:
            reasons["same"] = ((queries.labels[:, None] == samples.labels) & ~same)[..., None].expand_as(positives)
        if queries.features is not None and samples.features is not None:
            with fp32_products("highest"):
                mined: Positives = mine(queries.features, samples.features, samples.thresholds, first)
            reasons |= {name: getattr(mined, name) for name in REASONS}
        for mask in reasons.values():
            positives = positives | mask
        if counts is not None:
            for name, mask in reasons.items():
                counts[name] += mask.count_nonzero()
            counts["together"] += positives.count_nonzero() - same.count_nonzero() * samples.captions
        return positives

    @torch.no_grad()
    def promoted(self, batch: dict[str, Any], at_most: int) -> list[Promotion]:
        """Return pairs mined within this rank's part of the batch; a random `at_most` of them if there are more."""
        features = self.samples(batch, joined=False).features
        if features is None:
            return []
        features = ReferenceFeatures(*(part.cpu() for part in features))
        positives = mine(features, features, Thresholds(*self.cosines.tolist()), first_row=0)
        entries = (positives.any() & ~positives.same_sample).nonzero()
        chosen = torch.randperm(len(entries), generator=torch.Generator().manual_seed(0))[:at_most].sort().values
        by_name = zip(*(by_sample(batch, name) for name in self.names), strict=True)
        captions = [[text for texts in sample for text in texts] for sample in by_name]
        reasons = {name: getattr(positives, name) for name in REASONS}
        return [
            Promotion(
                image=i,
                sample=j,
                caption=captions[j][c],
                image_text=(features.image[i] @ features.text[j, c]).item(),
                image_image=(features.image[i] @ features.image[j]).item(),
                text_text=(features.mean_text[i] @ features.mean_text[j]).item(),
                reasons=tuple(name for name, mask in reasons.items() if mask[i, j, c]),
            )
            for i, j, c in entries[chosen].tolist()
        ]


def image_features(clip: Backbone, batch: dict[str, Any]) -> Float[Tensor, "b d"]:
    """Return features of the batch's images, of unit norm."""
    return F.normalize(clip.encode_image(batch["image"]).float(), dim=-1)


def text_features(clip: Backbone, batch: dict[str, Any], names: Iterable[str], key: str) -> dict[str, Tensor]:
    """Return the features of each text by name, [b, k, d] of unit norm, from one pass of the text tower.

    Args:
        clip: the model.
        batch: has the token ids of the texts under `key`, or else the texts themselves.
        names: names of the texts.
        key: entry of the batch with token ids by name.
    """
    made = batch.get(key, {})
    tokens = {name: made[name] if name in made else clip.tokenize(batch[name]) for name in names}
    features = F.normalize(clip.encode_text(torch.cat(list(tokens.values()))).float(), dim=-1)
    parts = features.split([len(rows) for rows in tokens.values()])
    return {name: part.unflatten(0, (len(batch["image"]), -1)) for name, part in zip(tokens, parts, strict=True)}
