"""Long-CLIP: a text tower that reads on where CLIP's stops, and keeps what it knew (arXiv 2403.15378)."""

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


def prefix_padded(tokens: Int[Tensor, "b l"], share: Float[Tensor, " b"]) -> Int[Tensor, "b l"]:
    """Texts moved towards the end of the context: `share` of each row's free places goes between start and first word.

    Short texts only ever train the first rows of a position table; moved, they train all of it.

    Source: prefix padding of DeBias-CLIP (arXiv 2602.22419); the law of the shift is ours: uniform over what is free.
    """
    places = torch.arange(tokens.shape[1], device=tokens.device)
    length = tokens.argmax(dim=1) + 1  # the end token has the largest id
    shift = (share * (tokens.shape[1] - length + 1)).long()[:, None]
    moved = tokens.gather(1, (places - shift).clamp(min=0))
    return torch.where((places > 0) & (places <= shift), 0, moved)


class LongCLIP(Method):
    """Both towers learn from long captions on a stretched position table, and from short ones on reduced images.

    The long caption meets the image itself; the short one, a summary, meets what is left of the image in the
    `components` main directions of the batch, so that the image need not forget its details to match a summary.
    `components_over` says whose directions: `batch`, those of all ranks together, so that any number of ranks gives
    the same loss; or `rank`, as the reference does, whose loss then depends on how many rows a rank holds, and a rank
    with at most `components` + 1 rows reduces nothing.

    `chunk` bounds memory for large batches on one GPU: towers run on so many rows at a time and again in the backward
    pass, so only features of the whole batch are held, and loss and gradients stay those of the whole batch.

    Source: Long-CLIP (arXiv 2403.15378), sections 3.1 to 3.3. Chunks: GradCache (arXiv 2101.06983).
    Departs: kept rows of the position table cannot move, where the reference only cuts their gradient; one text pass
    for both captions over real tokens; the temperature stays below 100 as in all methods here.
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
            raise ValueError(f"method.components is {components}: keep 1 or more, or null for images as they are.")
        if chunk is not None and chunk < 1:
            raise ValueError(f"method.chunk is {chunk}: rows at a time, or null for all at once.")
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
        for name, share in batch.get("cut", {}).items():
            self.note(f"data/{'short' if name == 'caption' else name}_cut", share)
        if self.prefix_padding and "short" in tokens:
            tokens["short"] = prefix_padded(tokens["short"], self.ranks.sample(torch.rand, rows=len(tokens["short"])))

        image = self.features(self.backbone.encode_image, batch["image"])
        text = self.features(self.backbone.encode_text, torch.cat(list(tokens.values())))
        long, *short = text.chunk(len(tokens))
        terms = {"long": self.contrast(image, long, self.label_smoothing)}
        if short:
            terms["short"] = self.short_weight * self.contrast(self.reduced(image), short[0], self.label_smoothing)
        return terms

    def features(self, encode: Callable[[Tensor], Tensor], rows: Tensor) -> Float[Tensor, "b d"]:
        """Normalized embeddings, the tower run on `chunk` rows at a time and once more in the backward pass."""
        if self.chunk is None or not torch.is_grad_enabled():
            encoded = encode(rows)
        else:
            encoded = torch.cat([checkpoint(encode, part, use_reentrant=False) for part in rows.split(self.chunk)])
        return F.normalize(encoded.float(), dim=-1)

    def reduced(self, image: Float[Tensor, "b d"]) -> Float[Tensor, "b d"]:
        """This rank's images on their main directions; as in the reference, not normalized again."""
        if self.components is None:
            return image
        if self.components_over == "rank":
            return principal_reconstruction(image, self.components)
        joined = principal_reconstruction(self.ranks.gather(image), self.components)
        return joined[self.ranks.rank * len(image) :][: len(image)]
