"""Output of a survey: histograms, precision over recall, tables, and a suggestion to paste."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from sklearn.metrics import precision_recall_curve
from torch import Tensor

from clipfix.evals.plots import AFTER, BEFORE, GREEN, INK, RED
from clipfix.functional.positives import Thresholds

# Each threshold with the cosines that it applies to.
CUTS = {"image_text": "S_it", "supported": "S_it", "image_image": "S_ii", "text_text": "S_tt"}
CONDITIONS = {"image_text": AFTER, "image_image": RED, "text_text": GREEN}  # what promotes a pair
DOTS: dict[str, Any] = {"configured": {"markersize": 6}, "suggested": {"markersize": 12, "markerfacecolor": "none"}}
PARTS = ("cosines", "alone", "promoted")
RULE = (
    "each condition alone promotes what is asked for (method.mining.thresholds if they are counts, else survey.extra "
    "in all), but image_text nothing below the median of own captions, and supported nothing below their lower "
    "quartile."
)


def precision_recall(same: Mapping[str, Tensor], cosines: Mapping[str, np.ndarray], found: Mapping[str, Any]) -> Figure:
    """Plot a curve for each condition alone, with a dot at each choice; the whole rule has dots only.

    By condition: which entries are truly the same, the cosines that should tell, and what was found of the choices.
    """
    figure = Figure(figsize=(6.4, 4.6), layout="constrained")
    axis = figure.subplots()
    for name, colour in CONDITIONS.items():
        precision, recall, _ = precision_recall_curve(same[name].numpy(), cosines[name], drop_intermediate=True)
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
    axis.axhline(100 * found["share"], color=INK, linewidth=0.8, linestyle=":", label="chance")
    axis.set(xlabel="recall, percent of same pairs", ylabel="precision, percent", xlim=(0, 100), ylim=(0, 103))
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def histograms(cosines: Mapping[str, np.ndarray], choices: Mapping[str, Thresholds]) -> Figure:
    """Plot the distributions of the cosines, in S_it also of own captions, with the thresholds."""
    figure = Figure(figsize=(13, 4), layout="constrained")
    titles = {"S_it": "S_it: image and caption", "S_ii": "S_ii: image and image", "S_tt": "S_tt: captions and captions"}
    lines: dict[str, Any] = {
        "configured": {"color": INK, "linewidth": 3.5, "alpha": 0.5},  # stays visible below the other if both agree
        "suggested": {"color": RED, "linewidth": 1.5},
    }
    for axis, (name, title) in zip(figure.subplots(1, 3), titles.items(), strict=True):
        _, edges, _ = axis.hist(cosines[name], bins=120, log=True, color=BEFORE, label="other samples")
        if name == "S_it":
            axis.hist(cosines["own"], bins=edges, color=AFTER, label="own captions")
        for choice, bars in choices.items():
            for threshold, bar in bars._asdict().items():
                if CUTS[threshold] == name and -1 <= bar <= 1:  # others promote everything or nothing
                    label = choice + (": supported" if threshold == "supported" else "")
                    axis.axvline(bar, linestyle=":" if threshold == "supported" else "-", label=label, **lines[choice])
        axis.set_title(title, fontsize=10, loc="left", fontweight="bold")
        axis.set(xlabel="cosine", ylabel="pairs" if name == "S_it" else None)
        axis.spines[["top", "right"]].set_visible(False)
    named = dict(zip(*reversed(figure.axes[0].get_legend_handles_labels()), strict=True))
    figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=len(named), frameon=False, fontsize=9)
    return figure


def tell(found: Mapping[str, Any], paths: list[Path]) -> None:
    """Print all results; the suggestion comes last, in a form to paste."""
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
        "thresholds=counts means. promoted: by the rule, in which image_image and text_text ask for supported too.",
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
    for kind, part in (("cosines", "cosines"), ("counts", "alone")):
        pasted = ", ".join(f"{name}: {value:.4g}" for name, value in found["suggested"][part].items())
        words = f"thresholds@method.mining.thresholds={kind} 'method.mining.thresholds={{{pasted}}}'"
        console.print(f"  {words}", soft_wrap=True, markup=False)
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
