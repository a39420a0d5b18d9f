"""Features of a frozen reference CLIP, stored in the shards; `data.features` reads them in training."""

import io
from functools import partial
from typing import Any

import numpy as np
import torch

from clipfix.annotate import Annotator, Raw, Sample
from clipfix.data.decoding import square
from clipfix.data.texts import strings
from clipfix.evals.embed import embed_images
from clipfix.evals.features import scoring
from clipfix.models.clip import Backbone

MEMBER = "features.npz"


class Features(Annotator):
    """Write `features.npz` of each sample: `image` [d], `text` [m, d], `strings` [m] and `keys`; unit norm, fp16.

    The texts are the sample's txt, if it has one, and all strings under `keys` of its json, without repeats. Features
    are computed as for scores: in fp32, from the centre crop of the resized picture.
    """

    def __init__(self, output: str, batch_size: int, backbone: Backbone, keys: list[str]) -> None:
        super().__init__(output, batch_size)
        self.backbone, self.keys = backbone.requires_grad_(False), keys
        self.prepare = partial(read, keys, backbone.image_size)

    def annotate(self, raws: list[Raw], inputs: dict[str, Any]) -> list[dict[str, bytes]]:
        with scoring(self.backbone) as clip:
            images = embed_images(clip.model, inputs["images"]).half().cpu().numpy()
            rows = clip.texts([text for texts in inputs["texts"] for text in texts]).half().cpu()
        parts = rows.split([len(texts) for texts in inputs["texts"]])
        members = []
        for image, part, texts in zip(images, parts, inputs["texts"], strict=True):
            file = io.BytesIO()
            # Compressed because of the strings: numpy stores four bytes per letter, and pads to the longest.
            arrays = {"image": image, "text": part.numpy(), "strings": np.array(texts)}
            np.savez_compressed(file, keys=np.array(["txt", *self.keys]), **arrays)
            members.append({MEMBER: file.getvalue()})
        return members


def read(keys: list[str], size: int, samples: list[Sample]) -> dict[str, Any]:
    """Return pictures in the size of the backbone, and the texts of each."""
    texts = []
    for sample in samples:
        found = [text for key in keys for text in strings(sample, key)]
        if sample["txt"]:
            found = [*strings(sample, "txt"), *found]
        if not found:
            raise ValueError("it has no txt, and annotator.keys names no key of its json")
        texts.append(list(dict.fromkeys(found)))
    return {"images": torch.stack([square(sample["image"], size) for sample in samples]), "texts": texts}
