"""Figures that compare groups of runs."""

import re
from collections.abc import Sequence
from math import pi
from statistics import fmean

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from clipfix.evals.plots import BEFORE, GROUPS, INK
from clipfix.results.compare.results import Group

# The nine patterns of MMVP-VLM (arXiv 2401.06209), with short labels for the circle.
PATTERNS = {
    "orientation_and_direction": "orientation",
    "presence_of_specific_features": "presence",
    "state_and_condition": "state",
    "quantity_and_count": "quantity",
    "positional_and_relational_context": "position",
    "color_and_appearance": "colour",
    "structural_and_physical_characteristics": "structure",
    "text": "text",
    "viewpoint_and_perspective": "viewpoint",
}
LEGEND = 0.22  # inches per line
MARKERS = "osD^vP"  # in addition to colours, for colour-blind readers


def style(i: int) -> tuple[str, str]:
    """Return colour and marker of the group with index i."""
    return GROUPS[i % len(GROUPS)], MARKERS[i % len(MARKERS)]


def benchmarks(groups: Sequence[Group]) -> list[str]:
    """Return the benchmarks for which every run has scores."""
    first = dict.fromkeys(name.split("/", 1)[0] for name in groups[0].results[0].after)
    return [name for name in first if all(result.metrics(name) for group in groups for result in group.results)]


def scores(group: Group, names: Sequence[str]) -> tuple[np.ndarray | None, np.ndarray]:
    """Return [metrics] scores before, as a mean over runs (None without any), and [seeds, metrics] scores after."""
    after = np.array([[result.after[name] for name in names] for result in group.results])
    before = [[result.before[name] for name in names] for result in group.results if result.before]
    return (np.mean(before, axis=0) if before else None), after


def deviation(values: np.ndarray) -> np.ndarray:
    """Return the standard deviation over seeds, the first axis; zeros for a single seed."""
    return values.std(axis=0, ddof=1) if len(values) > 1 else np.zeros(values.shape[1])


def before_curves(groups: Sequence[Group], names: Sequence[str]) -> list[tuple[str, np.ndarray]]:
    """Return (label, [metrics] scores before) to draw: one if all groups started from the same model, else one each."""
    curves = [(group.name, before) for group in groups if (before := scores(group, names)[0]) is not None]
    if curves and all(np.allclose(before, curves[0][1], atol=0.05) for _, before in curves):
        return [("before", curves[0][1])]
    return [(f"before {name}", before) for name, before in curves]


def label(group: Group) -> str:
    """Return the label of a group in a legend."""
    return f"{group.name} ({group.amount})"


def radar(groups: Sequence[Group]) -> Figure | None:
    """Return a radar chart of the nine patterns of MMVP, with bands of one standard deviation over seeds.

    None if no benchmark has these patterns.
    """
    candidates = [name for name in benchmarks(groups) if PATTERNS.keys() <= set(groups[0].results[0].metrics(name))]
    if not candidates:
        return None
    names = [f"{candidates[0]}/{pattern}" for pattern in PATTERNS]
    angles = np.linspace(0, 2 * pi, len(names) + 1)

    def closed(values: np.ndarray) -> np.ndarray:
        return np.append(values, values[0])

    figure = Figure(figsize=(5, 5 + LEGEND * len(groups)), layout="constrained")
    axis = figure.subplots(subplot_kw={"projection": "polar"})
    axis.set_theta_zero_location("N")  # type: ignore[attr-defined]
    axis.set_theta_direction(-1)  # type: ignore[attr-defined]
    for name, before in before_curves(groups, names):
        axis.fill(angles, closed(before), color=BEFORE, alpha=0.35, linewidth=0)
        axis.plot(angles, closed(before), color="#7b8494", linestyle="--", linewidth=1.3, label=name)
    for i, group in enumerate(groups):
        colour, marker = style(i)
        _, after = scores(group, names)
        mean, sd = after.mean(axis=0), deviation(after)
        low, high = closed((mean - sd).clip(0)), closed((mean + sd).clip(max=100))
        axis.fill_between(angles, low, high, color=colour, alpha=0.22, linewidth=0)
        axis.plot(angles, closed(mean), color=colour, marker=marker, markersize=4, linewidth=1.8, label=label(group))
    axis.set_xticks(angles[:-1], list(PATTERNS.values()), fontsize=10, color=INK)
    axis.tick_params(axis="x", pad=11)
    axis.set_ylim(0, 100)
    axis.set_yticks([25, 50, 75, 100], ["25", "50", "75", ""], fontsize=8, color="#5b6472")
    axis.set_rlabel_position(20)  # type: ignore[attr-defined]
    axis.grid(color="#dfe3e8", linewidth=0.8)
    axis.spines["polar"].set_color("#c9ced6")
    figure.legend(loc="outside lower center", ncols=1, frameon=False, fontsize=9)
    return figure


def forgetting(groups: Sequence[Group], gain: str, kept: str) -> Figure | None:
    """Return a scatter plot with one point per run: the change of `gain` against the mean change of a benchmark.

    None if a run lacks these scores.

    Args:
        groups: Groups of runs.
        gain: <benchmark>/<metric> that the method is meant to improve.
        kept: The benchmark that should not get worse; the mean over its metrics is drawn.
    """
    metrics = groups[0].results[0].metrics(kept)
    names = [f"{kept}/{metric}" for metric in metrics if metric != "mean"]
    runs = [result for group in groups for result in group.results]
    if not names or any(result.before is None or not {gain, *names} <= result.after.keys() for result in runs):
        return None
    figure = Figure(figsize=(5, 3.6 + LEGEND * len(groups)), layout="constrained")
    axis = figure.subplots()
    axis.axhline(0, color="#9aa3b0", linewidth=1, zorder=1)
    axis.axvline(0, color="#9aa3b0", linewidth=1, zorder=1)
    for i, group in enumerate(groups):
        colour, marker = style(i)
        points = np.array(
            [(result.change(gain), fmean(result.change(name) for name in names)) for result in group.results]
        )
        axis.scatter(
            points[:, 0], points[:, 1], color=colour, marker=marker, s=46, alpha=0.75, linewidth=0, label=label(group)
        )
        if len(points) > 1:
            mean, sd = points.mean(axis=0), deviation(points)
            axis.errorbar(mean[0], mean[1], xerr=sd[0], yerr=sd[1], color=colour, linewidth=1.4, capsize=3, zorder=3)
    set_limits(axis)
    benchmark, metric = gain.split("/")
    axis.set_xlabel(f"change of {readable(benchmark)}, {readable(metric)} (points)", color=INK)
    axis.set_ylabel(f"change of {readable(kept)} (points)", color=INK)
    style_axes(axis)
    figure.legend(loc="outside upper left", frameon=False, fontsize=9)
    return figure


def lengths(groups: Sequence[Group]) -> Figure | None:
    """Return R@1 against the caption length, with bands of one standard deviation over seeds.

    None if no benchmark has such metrics.
    """
    for benchmark in benchmarks(groups):
        matches = [re.fullmatch(r"(\d+)_tokens_R@1", metric) for metric in groups[0].results[0].metrics(benchmark)]
        tokens = [int(match[1]) for match in matches if match]
        if tokens:
            break
    else:
        return None
    names = [f"{benchmark}/{n}_tokens_R@1" for n in tokens]
    figure = Figure(figsize=(5, 3.4 + LEGEND * len(groups)), layout="constrained")
    axis = figure.subplots()
    for name, before in before_curves(groups, names):
        axis.plot(tokens, before, color="#7b8494", linestyle="--", marker="x", markersize=5, linewidth=1.5, label=name)
    for i, group in enumerate(groups):
        colour, marker = style(i)
        _, after = scores(group, names)
        mean, sd = after.mean(axis=0), deviation(after)
        axis.fill_between(tokens, mean - sd, mean + sd, color=colour, alpha=0.2, linewidth=0)
        axis.plot(tokens, mean, color=colour, marker=marker, markersize=5, linewidth=1.8, label=label(group))
    axis.set_xticks(tokens)
    axis.set_ylim(bottom=0)
    axis.set_xlabel("caption length, tokens", color=INK)
    axis.set_ylabel("R@1, mean of both directions (percent)", color=INK)
    style_axes(axis)
    figure.legend(loc="outside upper left", frameon=False, fontsize=9)
    return figure


def readable(name: str) -> str:
    """Return a name with spaces."""
    return name.replace("_", " ")


def set_limits(axis: Axes) -> None:
    """Set limits that include zero and a margin around the outermost points."""
    axis.margins(0.15)
    axis.autoscale_view()
    for limits, apply in ((axis.get_xlim(), axis.set_xlim), (axis.get_ylim(), axis.set_ylim)):
        apply(min(limits[0], -0.5), max(limits[1], 0.5))


def style_axes(axis: Axes) -> None:
    """Set the colours of spines, ticks and grid."""
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color("#9aa3b0")
    axis.tick_params(colors=INK, labelsize=9)
    axis.grid(color="#eceff3", linewidth=0.8)
    axis.set_axisbelow(True)
