"""Which thresholds suit one's own data and reference: its cosines in numbers and pictures, and a suggestion to paste.

Notation: S_it is the cosine of an image and a caption, S_ii of two images, S_tt of two samples' captions, their mean.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.metrics import average_precision_score, precision_recall_curve
from torch import Tensor
from torchmetrics.functional.classification import binary_precision, binary_recall

from clipfix.data import ShardData
from clipfix.evals.gallery import AFTER, BEFORE, GREEN, INK, RED
from clipfix.functional.positives import Frozen, Thresholds, mine, thresholds_for
from clipfix.methods.fff import FFF
from clipfix.report import save

QUANTILES = (0.5, 0.9, 0.99, 0.999, 1.0)
EXTRA = (0.05, 0.1, 0.25, 0.5, 1.0, 2.0)
# Each threshold with the cosines that it cuts.
CUTS = {"image_text": "S_it", "supported": "S_it", "image_image": "S_ii", "text_text": "S_tt"}
CONDITIONS = {"image_text": AFTER, "image_image": RED, "text_text": GREEN}  # what promotes a pair
DOTS: dict[str, Any] = {"configured": {"markersize": 6}, "suggested": {"markersize": 12, "markerfacecolor": "none"}}
PARTS = ("cosines", "alone", "promoted")
RULE = (
    "each condition alone promotes what is asked for (method.thresholds if they are counts, else survey.extra in all), "
    "but image_text nothing below the median of own captions, and supported nothing below their lower quartile."
)


def survey(method: FFF, data: ShardData, folder: Path, samples: int, extra: float) -> None:
    """Tables and a suggestion on screen; `thresholds.json` and pictures in the run folder.

    `samples` of the training stream are looked at. Counts are positives an image in a batch of `data.batch_size`, in
    which a sample counts 1 if all its captions are promoted. `extra` of them are suggested where the method's own
    thresholds do not say how many are wanted.
    """
    if not method.mines:
        raise ValueError("method.thresholds is null, so nothing is mined: run=thresholds needs any, as in conf/method.")
    among = data.batch_size
    if among < 2:
        raise ValueError(
            f"data.batch_size is {among}: thresholds choose among the others of a batch, so take 2 or more."
        )
    frozen, same = collect(method, data, samples)
    cosines = spread(frozen)
    asked = method.extra or Thresholds(extra / 3, among - 1, extra / 3, extra / 3)
    configured = thresholds_for(frozen, method.extra, among) if method.extra else Thresholds(*method.bars.tolist())
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
            pictures["precision_recall"] = truth.figure(choices, found["same"])
    (folder / "thresholds.json").write_text(json.dumps(found, indent=2) + "\n")
    paths = [folder / "thresholds.json", *(save(figure, folder / f"{name}.png") for name, figure in pictures.items())]
    tell(found, paths)


def collect(method: FFF, data: ShardData, samples: int) -> tuple[Frozen, Tensor | None]:
    """What the reference says of the first samples of the training stream, and their labels where `method.same` is set.

    Each sample once: the stream is a chain of passes, and a second look at a picture would pass for its double.
    """
    looks = []
    batches = math.ceil(samples / data.batch_size)
    for batch in track(islice(data.train_dataloader(), batches), "The reference looks at samples", total=batches):
        if batch["position"][1] > 0:
            break
        looks.append(method.look(method.transfer_batch_to_device(batch, method.device, 0), joined=False))
    if not looks:
        raise ValueError(
            f"data.train has fewer samples than a batch for each worker: lower data.batch_size ({data.batch_size}) "
            f"or data.workers ({data.workers})."
        )
    features = [look.frozen for look in looks if look.frozen is not None]
    frozen = Frozen(*(torch.cat(parts).cpu() for parts in zip(*features, strict=True))).rows(slice(samples))
    labels = [look.same for look in looks if look.same is not None]
    return frozen, torch.cat(labels).cpu()[:samples] if labels else None


# -- numbers -----------------------------------------------------------------------------------------------------------


def spread(frozen: Frozen) -> dict[str, np.ndarray]:
    """Cosines of images with their own captions; then of any two samples: S_it, S_ii and S_tt."""
    own = torch.eye(len(frozen.image), dtype=torch.bool)
    pair = torch.einsum("id,jkd->ijk", frozen.image, frozen.text)
    return {
        "own": pair[own].flatten().numpy(),
        "S_it": pair[~own].flatten().numpy(),
        "S_ii": (frozen.image @ frozen.image.T)[~own].numpy(),
        "S_tt": (frozen.gist @ frozen.gist.T)[~own].numpy(),
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


def judge(frozen: Frozen, cosines: Mapping[str, np.ndarray], choice: Thresholds, among: int) -> dict[str, Any]:
    """Positives an image of a batch: above each threshold alone (what `thresholds_are: extra` counts), and promoted."""
    alone = {
        name: float((cosines[cut] > cosine).mean()) * (among - 1)
        for (name, cut), cosine in zip(CUTS.items(), choice, strict=True)
    }
    mined = mine(frozen, frozen, choice, first_row=0)
    samples, captions = frozen.text.shape[:2]
    reasons = {name: getattr(mined, name) for name in CONDITIONS}
    reasons["together"] = mined.any() & ~mined.own
    each = (among - 1) / (samples * (samples - 1) * captions)
    promoted = {name: float(mask.sum()) * each for name, mask in reasons.items()}
    return {"cosines": choice._asdict(), "alone": alone, "promoted": promoted}


class Truth:
    """Precision and recall against pairs that are known to show the same: equal strings of the text `method.same`.

    Entries are those that become positives: image i and caption c of another sample j for image_text and the whole
    rule, pairs of samples for the other two.
    """

    def __init__(self, frozen: Frozen, cosines: Mapping[str, np.ndarray], same: Tensor) -> None:
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

    def figure(self, choices: Mapping[str, Thresholds], found: Mapping[str, Any]) -> Figure:
        """A curve for each condition alone, with a dot at each choice; the whole rule has dots only."""
        figure = Figure(figsize=(6.4, 4.6), layout="constrained")
        axis = figure.subplots()
        for name, colour in CONDITIONS.items():
            precision, recall, _ = precision_recall_curve(
                self.truth[name].numpy(), self.cosines[name], drop_intermediate=True
            )
            label = f"{name}, area {100 * found[name]['area']:.0f} %"
            axis.step(100 * recall, 100 * precision, where="post", color=colour, linewidth=1.5, label=label)
        for name, colour in {**CONDITIONS, "together": INK}.items():
            for choice, shape in DOTS.items():
                point = found[name][choice]
                if point["precision"] is not None:
                    place = 100 * point["recall"], 100 * point["precision"]
                    axis.plot(*place, "D" if name == "together" else "o", color=colour, clip_on=False, **shape)
        axis.plot([], [], "D", color=INK, label="the whole rule")
        for choice, shape in DOTS.items():
            axis.plot([], [], "o", color="grey", label=choice, **shape)
        axis.axhline(100 * self.share, color=INK, linewidth=0.8, linestyle=":", label="chance")
        axis.set(xlabel="recall, percent of same pairs", ylabel="precision, percent", xlim=(0, 100), ylim=(0, 103))
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
        return figure


def hits(promoted: Tensor, truth: Tensor) -> dict[str, float | None]:
    """Precision, none where nothing is promoted, and recall."""
    both = promoted.int(), truth.int()
    precision = float(binary_precision(*both, validate_args=False)) if promoted.any() else None
    return {"precision": precision, "recall": float(binary_recall(*both, validate_args=False))}


# -- for the eye -------------------------------------------------------------------------------------------------------


def histograms(cosines: Mapping[str, np.ndarray], choices: Mapping[str, Thresholds]) -> Figure:
    """Where the cosines of others lie, own captions among them in S_it, and where the thresholds cut."""
    figure = Figure(figsize=(13, 4), layout="constrained")
    titles = {"S_it": "S_it: image and caption", "S_ii": "S_ii: image and image", "S_tt": "S_tt: captions and captions"}
    lines: dict[str, Any] = {
        "configured": {"color": INK, "linewidth": 3.5, "alpha": 0.5},  # seen beneath the other where both agree
        "suggested": {"color": RED, "linewidth": 1.5},
    }
    for axis, (name, title) in zip(figure.subplots(1, 3), titles.items(), strict=True):
        _, edges, _ = axis.hist(cosines[name], bins=120, log=True, color=BEFORE, label="other samples")
        if name == "S_it":
            axis.hist(cosines["own"], bins=edges, color=AFTER, label="own captions")
        for choice, bars in choices.items():
            for threshold, bar in bars._asdict().items():
                if CUTS[threshold] == name and -1 <= bar <= 1:  # others let everything through or nothing
                    label = choice + (": supported" if threshold == "supported" else "")
                    axis.axvline(bar, linestyle=":" if threshold == "supported" else "-", label=label, **lines[choice])
        axis.set_title(title, fontsize=10, loc="left", fontweight="bold")
        axis.set(xlabel="cosine", ylabel="pairs" if name == "S_it" else None)
        axis.spines[["top", "right"]].set_visible(False)
    named = dict(zip(*reversed(figure.axes[0].get_legend_handles_labels()), strict=True))
    figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=len(named), frameon=False, fontsize=9)
    return figure


def tell(found: Mapping[str, Any], paths: list[Path]) -> None:
    """Everything that was found, on screen; the suggestion last, as it is to be pasted."""
    console = Console(highlight=False)
    captions, among, choices = found["captions"], found["batch_size"], ("configured", "suggested")
    shown = grid(f"Cosines of {found['samples']} samples, {captions} captions each", [""], found["cosines"]["own"])
    for name, row in found["cosines"].items():
        shown.add_row("S_it own" if name == "own" else f"{name} others", *map(number, row.values()))
    console.print(shown)

    shown = grid("Cosines above which each alone promotes so many", ["an image"], CUTS)
    for count, row in found["extra"].items():
        shown.add_row(count, *map(number, row.values()))
    console.print(shown)

    shown = grid("What thresholds promote an image", ["", "condition"], PARTS)
    for choice in choices:
        shown.add_section()
        for name in (*CUTS, "together"):
            cells = (number(found[choice][part].get(name)) for part in PARTS)
            shown.add_row(choice if name == "image_text" else "", name, *cells)
    console.print(shown)
    console.print(
        f"An image of a batch of {among}; 1 is a sample with all its captions. alone: above that cosine, which is what "
        "thresholds_are=extra counts. promoted: by the rule, in which image_image and text_text ask for supported too.",
        soft_wrap=True,
    )

    if "same" in found:
        if len(found["same"]) > 1:
            pairs = [(choice, what) for choice in choices for what in ("precision", "recall")]
            shown = grid("Against pairs known to be the same, percent", [""], ["area", *map("\n".join, pairs)])
            for name in (*CONDITIONS, "together"):
                row = found["same"][name]
                values = [row.get("area"), *(row[choice][what] for choice, what in pairs)]
                shown.add_row(name, *("" if value is None else f"{100 * value:.1f}" for value in values))
            console.print(shown)
        console.print(f"{100 * found['same']['share']:.3g} % of the pairs are known to be the same: chance precision.")

    console.print(f"\nSuggested: {RULE}\nAs cosines, or as counts:", soft_wrap=True)
    for kind, part in (("cosines", "cosines"), ("extra", "alone")):
        pasted = ", ".join(f"{name}: {value:.4g}" for name, value in found["suggested"][part].items())
        console.print(f"  method.thresholds_are={kind} 'method.thresholds={{{pasted}}}'", soft_wrap=True, markup=False)
    console.print("Written: " + ", ".join(str(path) for path in paths), soft_wrap=True, markup=False)


def grid(title: str, names: Sequence[str], numbers: Iterable[str]) -> Table:
    shown = Table(title=title, title_justify="left")
    for name in names:
        shown.add_column(name)
    for name in numbers:
        shown.add_column(name, justify="right")
    return shown


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
