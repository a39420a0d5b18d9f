"""Features and latents that `run=annotate` stored beside pictures: reading them for a sample, and checks."""

import io
import itertools
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from clipfix.data.decoding import fingerprint
from clipfix.data.shards import read_shard
from clipfix.data.texts import Text


def stored_features(
    raw: Mapping[str, Any], member: str, texts: Mapping[str, Text], drawn: Mapping[str, list[str]]
) -> dict[str, Tensor]:
    """Return features that `run=annotate annotator=features` stored of a sample.

    Args:
        raw: the undecoded sample.
        member: suffix of the stored features in the shard.
        texts: settings of the texts by name.
        drawn: the k texts of this sample by name.

    Returns:
        `image` [1, d], and [k, d] for each name of texts whose key was encoded.

    Raises:
        ValueError: if the features, or those of a text, are missing.
    """
    if member not in raw:
        raise ValueError(f"no {member}: write it with run=annotate annotator=features, or set data.features=null")
    with np.load(io.BytesIO(raw[member]), allow_pickle=False) as stored:
        image, rows = (torch.from_numpy(stored[name]).float() for name in ("image", "text"))
        row = {text: i for i, text in enumerate(stored["strings"].tolist())}
        keys = stored["keys"].tolist()
    features = {"image": image[None]}
    for name, text in texts.items():
        if not text.unchanged or text.key not in keys:
            continue
        if absent := [string for string in drawn[name] if string not in row]:
            raise ValueError(f"{member} has no features of the {name} {absent[0]!r}: annotate these shards again")
        features[name] = rows[[row[string] for string in drawn[name]]]
    return features


def stored_latent(raw: Mapping[str, Any], member: str, of: str | None) -> Float[Tensor, "c y x"]:
    """Return the latent [c, y, x] that `run=annotate annotator=latents` stored of a sample.

    Args:
        raw: the undecoded sample.
        member: suffix of the stored latent in the shard.
        of: the expected identity of the autoencoder (`Diffusion.latents_of`).

    Raises:
        ValueError: if the latent is missing, or is of another autoencoder or another picture.
    """
    if member not in raw:
        raise ValueError(no_latents(member))
    with np.load(io.BytesIO(raw[member]), allow_pickle=False) as stored:
        latent, source, picture = (stored[name] for name in ("latent", "of", "picture"))
    if source != of:
        raise ValueError(f"its {member} is of {source}, not of {of}")
    if picture != fingerprint(raw):
        raise ValueError(f"its picture is not the one that {member} was computed from: annotate these shards again")
    return torch.from_numpy(latent).float()


def check_latents(shards: list[str], member: str, of: str | None) -> None:
    """Raise ValueError if shards have no latents, or latents of another autoencoder or size.

    The first sample of each local shard is checked. Remote shards may take long to open; if all are remote, only the
    first shard is checked.
    """
    for shard in [shard for shard in shards if not urlsplit(shard).scheme] or shards[:1]:
        for raw in itertools.islice(read_shard(shard), 1):
            if member not in raw:
                raise ValueError(f"{shard} has {no_latents(member)}")
            try:
                with np.load(io.BytesIO(raw[member]), allow_pickle=False) as stored:
                    source = str(stored["of"])
            except Exception:  # damaged: training skips and counts it with other broken samples
                continue
            if source != of:
                raise ValueError(
                    f"{shard} has latents of {source}, but this run needs those of {of}: write them with run=annotate "
                    "annotator=latents with the same diffusion and backbone, or set data.latents=null"
                )


def no_latents(member: str) -> str:
    return f"no {member}: write it with run=annotate annotator=latents, or set data.latents=null"
