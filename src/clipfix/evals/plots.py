"""Colours of all figures, and grids of images with captions."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib import rcParams
from matplotlib.figure import Figure
from PIL import Image

rcParams["text.parse_math"] = False  # a caption with two dollar signs is no formula

GREEN, RED, INK = "#2e7d32", "#c62828", "#2b2f36"
BEFORE, AFTER = "#b8bec9", "#3a6ea5"  # the two scorings of a run, in every chart
# Colours of groups of runs, which colour-blind readers can distinguish: Okabe and Ito, Color Universal Design (2008).
# AFTER replaces its blue; its yellow is left out, because lines in it are hard to see on white.
GROUPS = (AFTER, "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")


@dataclass(frozen=True)
class Cell:
    """One image with a title above and lines of text below: green (True), red (False) or neutral (None)."""

    image: Image.Image
    title: str
    lines: Sequence[tuple[str, bool | None]]


def gallery(cells: Sequence[Cell], across: int, characters: int = 30) -> Figure:
    """Return a grid of cells, filled row by row.

    Args:
        cells: The images with their texts.
        across: Number of columns.
        characters: Characters in a line; a text is cut after three lines.
    """
    down = -(-len(cells) // across)
    wrapped = [
        [(piece, right) for text, right in cell.lines for piece in textwrap.wrap(text, characters)[:3]]
        for cell in cells
    ]
    deepest = max(len(lines) for lines in wrapped)
    figure = Figure(figsize=(2.1 * across, down * (2.1 + 0.17 * (deepest + 1))), layout="tight")
    axes = figure.subplots(down, across, squeeze=False).flat
    for axis, cell, lines in zip(axes, cells, wrapped, strict=False):
        axis.imshow(cell.image.resize((256, 256), Image.Resampling.LANCZOS))
        axis.set_title(cell.title, fontsize=8, color=INK, fontweight="bold")
        for row, (line, right) in enumerate(lines):
            colour = INK if right is None else GREEN if right else RED
            axis.annotate(
                line,
                (0.5, -5 - 11 * row),
                xycoords=("axes fraction", "axes points"),
                ha="center",
                va="top",
                fontsize=7,
                color=colour,
            )
    for axis in figure.axes:
        axis.axis("off")
    return figure
