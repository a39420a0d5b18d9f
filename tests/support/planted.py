"""A model whose embeddings are set by the test, and shards for it."""

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from shards import encoded, pack
from torch import Tensor, nn

from clipfix.models.base import Model

PATCHES = 5


class Planted(Model):
    """Embeds picture i as `images[i]` and a text as `texts[text]`, through an identity layer and dropout."""

    image_size = 8
    context_length = 248

    def __init__(self, images: Tensor, texts: dict[str, Tensor]) -> None:
        super().__init__()
        self.words = list(texts)
        self.images, self.vectors = images, torch.stack(list(texts.values()))
        self.layer = nn.Linear(images.shape[1], images.shape[1], bias=False)
        nn.init.eye_(self.layer.weight)
        self.dropout = nn.Dropout(0.5)
        self.seen = 0
        self.dtypes: set[torch.dtype] = set()

    def encode_image(self, images: Tensor) -> Tensor:
        self.seen += len(images)
        return self._embed(self.images[(images[:, 0, 0, 0] * 255).round().long()])

    def visual_tokens(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return patches: patch n is the vector of the picture, rolled by n + 1 and multiplied by n + 1."""
        pooled = self.encode_image(images)
        return pooled, torch.stack([(n + 1) * pooled.roll(n + 1, dims=-1) for n in range(PATCHES)], dim=1)

    def encode_text(self, tokens: Tensor) -> Tensor:
        return self._embed(self.vectors[tokens[:, 0]])

    def tokenize(self, texts: list[str], at_most: int | None = None) -> Tensor:
        """Return one token for each text, its index. A truncated text must be one of the texts too."""
        cut = [" ".join(text.split()[: at_most and at_most - 2]) for text in texts]
        return torch.tensor([[self.words.index(text)] for text in cut])

    @property
    def text(self) -> nn.Module:
        return self.layer

    def load_trained(self, state: Any) -> None:
        raise NotImplementedError

    def _embed(self, vectors: Tensor) -> Tensor:
        out = self.dropout(self.layer(vectors.to(self.layer.weight.dtype)))
        self.dtypes.add(out.dtype)
        return out


def write_shard(path: Path, records: list[dict[str, Any]]) -> str:
    """Write a sample for each record, in the schema of data/README.md. Picture i has the grey value i."""
    samples = {
        f"{i:06d}": {
            "png": encoded(Image.new("RGB", (8, 8), (i, i, i))),
            "txt": record.get("caption", ""),
            "json": record,
        }
        for i, record in enumerate(records)
    }
    return str(pack(path, samples))
