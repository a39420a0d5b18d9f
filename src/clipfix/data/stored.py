"""What `run=annotate` stored beside pictures: features and latents, found again for a sample, and checked."""

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


def look_up(
    raw: Mapping[str, Any], member: str, texts: Mapping[str, Text], drawn: Mapping[str, list[str]]
) -> dict[str, Tensor]:
    """What `run=annotate annotator=features` stored: `image` [1, d], and [k, d] of drawn texts whose key it encoded."""
    if member not in raw:
        raise ValueError(f"no {member}: make it by run=annotate annotator=features, or set data.features=null")
    with np.load(io.BytesIO(raw[member]), allow_pickle=False) as stored:
        image, rows = (torch.from_numpy(stored[name]).float() for name in ("image", "text"))
        row = {text: i for i, text in enumerate(stored["strings"].tolist())}
        keys = stored["keys"].tolist()
    found = {"image": image[None]}
    for name, text in texts.items():
        if not text.whole or text.key not in keys:
            continue
        if absent := [string for string in drawn[name] if string not in row]:
            raise ValueError(f"{member} has nothing of the {name} {absent[0]!r}: annotate these shards again")
        found[name] = rows[[row[string] for string in drawn[name]]]
    return found


def look_up_latent(raw: Mapping[str, Any], member: str, of: str | None) -> Float[Tensor, "c y x"]:
    """What `run=annotate annotator=latents` stored of this very picture; `of` is what `Diffusion.latents_of` says."""
    if member not in raw:
        raise ValueError(no_latents(member))
    with np.load(io.BytesIO(raw[member]), allow_pickle=False) as stored:
        latent, found, picture = (stored[name] for name in ("latent", "of", "picture"))
    if found != of:
        raise ValueError(f"its {member} is of {found}, not of {of}")
    if picture != fingerprint(raw):
        raise ValueError(f"its picture is not the one that {member} was made of: annotate these shards again")
    return torch.from_numpy(latent).float()


def check_latents(shards: list[str], member: str, of: str | None) -> None:
    """Refuses shards without latents, or with those of another autoencoder or size, before anything is trained.

    The first sample of each local shard is asked; of others, which may take long to open, that of the first shard.
    """
    for shard in [shard for shard in shards if not urlsplit(shard).scheme] or shards[:1]:
        for raw in itertools.islice(read_shard(shard), 1):
            if member not in raw:
                raise ValueError(f"{shard} has {no_latents(member)}")
            try:
                with np.load(io.BytesIO(raw[member]), allow_pickle=False) as stored:
                    found = str(stored["of"])
            except Exception:  # damaged: training counts it with other broken samples
                continue
            if found != of:
                raise ValueError(
                    f"{shard} has latents of {found}, and this run reads those of {of}: write them by run=annotate "
                    "annotator=latents with diffusion and backbone as here, or set data.latents=null"
                )


def no_latents(member: str) -> str:
    return f"no {member}: make it by run=annotate annotator=latents, or set data.latents=null"
