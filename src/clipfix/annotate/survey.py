"""Thresholds that suit the data and the reference: its cosines in numbers and pictures, and a suggestion to paste.

Notation: S_it is the cosine of an image and a caption, S_ii of two images, S_tt of two samples' captions, their mean.
"""

import json
import math
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import Progress
from sklearn.metrics import average_precision_score
from torch import Tensor
from torchmetrics.functional.classification import binary_precision, binary_recall

from clipfix.annotate.survey_plots import CONDITIONS, CUTS, histograms, precision_recall, tell
from clipfix.data.module import ShardData
from clipfix.functional.positives import ReferenceFeatures, Thresholds, mine, thresholds_for
from clipfix.methods.fff import FFF
from clipfix.results.report import save

QUANTILES = (0.5, 0.9, 0.99, 0.999, 1.0)
EXTRA = (0.05, 0.1, 0.25, 0.5, 1.0, 2.0)


def survey(method: FFF, data: ShardData, folder: Path, samples: int, extra: float) -> None:
    """Print tables and a suggestion; write `thresholds.json` and pictures to the run folder.

    `samples` of the training stream are looked at. Counts are positives an image in a batch of `data.batch_size`, in
    which a sample counts 1 if all its captions are promoted. `extra` of them are suggested where the method's own
    thresholds do not say how many are wanted.
    """
    mining = method.mining
    if not mining.active:
        raise ValueError(
            "method.mining.thresholds is null, so nothing is mined: run=thresholds needs some, as in conf/thresholds."
        )
    among = data.batch_size
    if among < 2:
        raise ValueError(
            f"data.batch_size is {among}: thresholds choose among the others of a batch, so take 2 or more."
        )
    frozen, same = collect(method, data, samples)
    cosines = spread(frozen)
    asked = mining.counts or Thresholds(extra / 3, among - 1, extra / 3, extra / 3)
    configured = thresholds_for(frozen, mining.counts, among) if mining.counts else Thresholds(*mining.cosines.tolist())
    choices = {"configured": configured, "suggested": suggest(cosines, asked, among)}
    found: dict[str, Any] = {
        "samples": len(frozen.image),
        "captions": frozen.text.shape[1],
        "batch_size": among,
        "cosines": {name: describe(values) for name, values in cosines.items()},
        "extra": {str(count): cuts(cosines, Thresholds(*[count] * 4), among)._asdict() for count in EXTRA},
        **{name: judge(frozen, cosines, choice, among) for name, choice in choices.items()},
    }
    pictures = {"thresholds": histograms(cosines, choices)}
    if same is not None:
        truth = Truth(frozen, cosines, same)
        found["same"] = truth.judge(choices)
        if truth.share > 0:
            pictures["precision_recall"] = precision_recall(truth.truth, truth.cosines, found["same"])
    (folder / "thresholds.json").write_text(json.dumps(found, indent=2) + "\n")
    paths = [folder / "thresholds.json", *(save(figure, folder / f"{name}.png") for name, figure in pictures.items())]
    tell(found, paths)


def collect(method: FFF, data: ShardData, samples: int) -> tuple[ReferenceFeatures, Tensor | None]:
    """Return the reference's features of the first training samples, and their labels if `method.mining.same` is set.

    Each sample occurs once: a second copy of a picture would count as a duplicate. So the first pass alone is read, and
    of samples with the same key, such as those that stand in for broken ones, the first.
    """
    looks, keys = [], []
    batches = math.ceil(samples / data.batch_size)
    with Progress() as bar:
        task = bar.add_task("The reference looks at samples", total=batches)
        for batch in islice(data.train_dataloader(), batches):
            if batch["position"][1] > 0:
                break
            batch = data.on_after_batch_transfer(method.transfer_batch_to_device(batch, method.device, 0), 0)
            looks.append(method.mining.samples(batch, joined=False))
            keys += batch["key"]
            bar.advance(task)
    if not looks:
        raise ValueError(
            f"data.train has fewer samples than a batch for each worker: lower data.batch_size ({data.batch_size}) "
            f"or data.workers ({data.workers})."
        )
    features = [look.features for look in looks if look.features is not None]
    first = {key: row for row, key in reversed(list(enumerate(keys)))}
    kept = sorted(first.values())[:samples]
    frozen = ReferenceFeatures(*(torch.cat(parts).cpu() for parts in zip(*features, strict=True))).rows(kept)
    labels = [look.labels for look in looks if look.labels is not None]
    return frozen, torch.cat(labels).cpu()[kept] if labels else None


# -- numbers -----------------------------------------------------------------------------------------------------------


def spread(frozen: ReferenceFeatures) -> dict[str, np.ndarray]:
    """Return the cosines of images with their own captions; then of any two samples: S_it, S_ii and S_tt."""
    own = torch.eye(len(frozen.image), dtype=torch.bool)
    pair = torch.einsum("id,jkd->ijk", frozen.image, frozen.text)
    return {
        "own": pair[own].flatten().numpy(),
        "S_it": pair[~own].flatten().numpy(),
        "S_ii": (frozen.image @ frozen.image.T)[~own].numpy(),
        "S_tt": (frozen.mean_text @ frozen.mean_text.T)[~own].numpy(),
    }


def describe(values: np.ndarray) -> dict[str, float]:
    quantiles = np.quantile(values, QUANTILES).tolist()
    names = [f"{100 * share:g} %" for share in QUANTILES[:-1]] + ["max"]
    return {"mean": float(values.mean()), "sd": float(values.std()), **dict(zip(names, quantiles, strict=True))}


def cuts(cosines: Mapping[str, np.ndarray], extra: Thresholds, among: int) -> Thresholds:
    """The cosines above which lie so many pairs an image of a batch; `thresholds_for`, quick enough for a table."""
    return Thresholds(
        *(
            float(np.quantile(cosines[name], 1 - min(1.0, count / (among - 1)), method="inverted_cdf"))
            for name, count in zip(CUTS.values(), extra, strict=True)
        )
    )


def suggest(cosines: Mapping[str, np.ndarray], asked: Thresholds, among: int) -> Thresholds:
    """Cosines that promote as many as asked, but no pair that fits worse than pictures fit their own captions.

    Nobody says here which pairs are truly alike. What is known is how many positives are wanted, and how well a caption
    fits its own picture. So a pair that image and caption alone promote must fit as well as the median of own captions,
    and one that has support as well as their lower quartile: ours. Images among themselves and captions among
    themselves have no such yardstick, and the count decides. Rounded down, so that a double of cosine 1 is above.
    """
    found = cuts(cosines, asked, among)
    lower, median = np.quantile(cosines["own"], (0.25, 0.5)).tolist()
    floored = found._replace(image_text=max(found.image_text, median), supported=max(found.supported, lower))
    return Thresholds(*(math.floor(cosine * 1e4) / 1e4 for cosine in floored))


def judge(
    frozen: ReferenceFeatures, cosines: Mapping[str, np.ndarray], choice: Thresholds, among: int
) -> dict[str, Any]:
    """Positives an image of a batch: above each threshold alone (what `Counts` count), and promoted."""
    alone = {
        name: float((cosines[cut] > cosine).mean()) * (among - 1)
        for (name, cut), cosine in zip(CUTS.items(), choice, strict=True)
    }
    mined = mine(frozen, frozen, choice, first_row=0)
    samples, captions = frozen.text.shape[:2]
    reasons = {name: getattr(mined, name) for name in CONDITIONS}
    reasons["together"] = mined.any() & ~mined.same_sample
    each = (among - 1) / (samples * (samples - 1) * captions)
    promoted = {name: float(mask.sum()) * each for name, mask in reasons.items()}
    return {"cosines": choice._asdict(), "alone": alone, "promoted": promoted}


class Truth:
    """Precision and recall against pairs known to show the same: equal strings of the text `method.mining.same`.

    Entries are those that become positives: image i and caption c of another sample j for image_text and the whole
    rule, pairs of samples for the other two.
    """

    def __init__(self, frozen: ReferenceFeatures, cosines: Mapping[str, np.ndarray], same: Tensor) -> None:
        self.frozen, captions = frozen, frozen.text.shape[1]
        self.others = ~torch.eye(len(same), dtype=torch.bool)
        pairs = (same[:, None] == same)[self.others]
        self.share = float(pairs.float().mean())
        self.truth = dict.fromkeys(CONDITIONS, pairs) | {"image_text": pairs.repeat_interleave(captions)}
        self.cosines = {name: cosines[CUTS[name]] for name in CONDITIONS}

    def judge(self, choices: Mapping[str, Thresholds]) -> dict[str, Any]:
        """The share of true pairs; by condition the area under its curve, precision and recall of each choice."""
        found: dict[str, Any] = {"share": self.share}
        if self.share == 0:
            return found
        for name, cosines in self.cosines.items():
            found[name] = {"area": float(average_precision_score(self.truth[name].numpy(), cosines))}
            for choice, bars in choices.items():
                found[name][choice] = hits(torch.from_numpy(cosines > getattr(bars, name)), self.truth[name])
        found["together"] = {
            choice: hits(mine(self.frozen, self.frozen, bars, 0).any()[self.others].flatten(), self.truth["image_text"])
            for choice, bars in choices.items()
        }
        return found


def hits(promoted: Tensor, truth: Tensor) -> dict[str, float | None]:
    """Precision, none where nothing is promoted, and recall."""
    both = promoted.int(), truth.int()
    precision = float(binary_precision(*both, validate_args=False)) if promoted.any() else None
    return {"precision": precision, "recall": float(binary_recall(*both, validate_args=False))}
