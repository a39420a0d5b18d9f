"""Long-CLIP: extends CLIP's text tower to long captions and keeps its abilities on short ones (arXiv 2403.15378)."""

from collections.abc import Callable
from typing import Any, ClassVar, Literal, Unpack

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from clipfix.functional.components import principal_reconstruction
from clipfix.methods.base import Method, check_choice
from clipfix.models.clip import Backbone
from clipfix.training.phases import Training


def pad_prefix(tokens: Int[Tensor, "b l"], uniform: Float[Tensor, " b"]) -> Int[Tensor, "b l"]:
    """Return texts shifted towards the end of the context, with padding between the start token and the first word.

    Without the shift, short texts train only the first rows of the position table.

    Args:
        tokens: token ids, one text in each row.
        uniform: draws in [0, 1): the fraction of a text's free positions that it is shifted by.

    Source: prefix padding of DeBias-CLIP (arXiv 2602.22419); the uniform distribution of the shift is ours.
    """
    positions = torch.arange(tokens.shape[1], device=tokens.device)
    length = tokens.argmax(dim=1) + 1  # the end token has the largest id
    shift = (uniform * (tokens.shape[1] - length + 1)).long()[:, None]
    shifted = tokens.gather(1, (positions - shift).clamp(min=0))
    return torch.where((positions > 0) & (positions <= shift), 0, shifted)


class LongCLIP(Method):
    """Both towers are trained on long captions, with a stretched position table, and on short captions.

    A long caption is contrasted with the image features. A short caption, a summary, is contrasted with the
    reconstruction of the image features from the principal components of the batch, so that the features need not lose
    details to match a summary.

    Args:
        keep_tokens: first rows of the position table that are neither stretched nor trained.
        ratio: rows of the stretched table for each of the other rows; 1 does not stretch.
        components: number of principal components; None for the image features themselves.
        components_over: `batch` computes them over all ranks, so that the loss does not depend on the number of ranks.
            `rank` computes them over the rows of each rank, as the reference does; with at most `components` + 1 rows,
            features are then not reduced.
        short_weight: factor on the loss of short captions; 0 trains on long captions alone.
        prefix_padding: shift short captions along the context, see `pad_prefix`.
        label_smoothing: as in `torch.nn.functional.cross_entropy`.
        start_scale: initial inverse temperature; None for the pretrained one.
        chunk: rows that a tower processes at a time; None for all. It bounds memory for large batches on one GPU: the
            towers run again in the backward pass, so only features are held for the whole batch. Loss and gradients
            are those of the whole batch.

    Source: Long-CLIP (arXiv 2403.15378), sections 3.1 to 3.3. Chunks: GradCache (arXiv 2101.06983).
    Departs: the first rows of the position table are frozen exactly; the reference only sets their gradient to zero.
    Both captions are encoded in one pass without padding. The inverse temperature is limited to 100, as in all methods.
    """

    memory: ClassVar[tuple[str, ...]] = ("method.chunk",)

    def __init__(
        self,
        backbone: Backbone,
        keep_tokens: int,
        ratio: int,
        components: int | None,
        components_over: Literal["batch", "rank"],
        short_weight: float,
        prefix_padding: bool,
        label_smoothing: float,
        start_scale: float | None,
        chunk: int | None,
        **training: Unpack[Training],
    ):
        super().__init__(backbone, **training)
        check_choice("components_over", components_over, "batch", "rank")
        if components is not None and components < 1:
            raise ValueError(f"method.components is {components}: set it to 1 or more, or to null for no reduction.")
        if chunk is not None and chunk < 1:
            raise ValueError(f"method.chunk is {chunk}: set it to 1 or more rows, or to null for all at once.")
        self.check_smoothing(label_smoothing)
        if ratio < 1:
            raise ValueError(f"method.ratio is {ratio}: set it to 1 or more.")
        most = backbone.context_length - (2 if ratio > 1 else 0)  # two rows are needed to interpolate
        if not 0 <= keep_tokens <= most:
            raise ValueError(f"method.keep_tokens is {keep_tokens}: set it between 0 and {most} for this backbone.")
        self.components, self.components_over = components, components_over
        self.short_weight, self.prefix_padding = short_weight, prefix_padding
        self.label_smoothing, self.chunk = label_smoothing, chunk
        backbone.stretch(keep_tokens, ratio)
        backbone.requires_grad_(True)
        self.frozen_rows.freeze(backbone.text.get_parameter("positional_embedding"), keep_tokens if ratio > 1 else 0)
        self.needs = self.clip_needs(*(("long", "caption") if short_weight else ("long",)), count_cut=True)
        if start_scale is not None:
            backbone.logit_scale.data.fill_(start_scale).log_()

    def loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        tokens = {"long": self.tokens(batch, "long")}
        if self.short_weight:
            tokens["short"] = self.tokens(batch, "caption")
        for name, fraction in batch.get("cut", {}).items():
            self.note(f"data/{'short' if name == 'caption' else name}_cut", fraction)
        if self.prefix_padding and "short" in tokens:
            tokens["short"] = pad_prefix(tokens["short"], self.ranks.sample(torch.rand, rows=len(tokens["short"])))

        image = self.features(self.backbone.encode_image, batch["image"])
        text = self.features(self.backbone.encode_text, torch.cat(list(tokens.values())))
        long, *short = text.chunk(len(tokens))
        terms = {"long": self.contrast(image, long, self.label_smoothing)}
        if short:
            terms["short"] = self.short_weight * self.contrast(self.reduced(image), short[0], self.label_smoothing)
        return terms

    def features(self, encode: Callable[[Tensor], Tensor], rows: Tensor) -> Float[Tensor, "b d"]:
        """Return features of unit norm; the tower runs on `chunk` rows at a time, and again in the backward pass."""
        if self.chunk is None or not torch.is_grad_enabled():
            encoded = encode(rows)
        else:
            encoded = torch.cat([checkpoint(encode, part, use_reentrant=False) for part in rows.split(self.chunk)])
        return F.normalize(encoded.float(), dim=-1)

    def reduced(self, image: Float[Tensor, "b d"]) -> Float[Tensor, "b d"]:
        """Return this rank's image features reconstructed from principal components; not normalized again."""
        if self.components is None:
            return image
        if self.components_over == "rank":
            return principal_reconstruction(image, self.components)
        joined = principal_reconstruction(self.ranks.gather(image), self.components)
        return joined[self.ranks.rank * len(image) :][: len(image)]
