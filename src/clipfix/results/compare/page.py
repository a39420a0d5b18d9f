"""report.html: a single file without external resources, for screens, phones and print."""

import base64
import io
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from clipfix import __version__
from clipfix.results.compare.examples import Case
from clipfix.results.compare.figures import style
from clipfix.results.compare.results import Group, Result
from clipfix.results.compare.rows import Cell, Row, number, same_start, sections, summary

CAPTIONS = {
    "radar": (
        "The nine patterns of MMVP",
        "Percent of pairs that are matched correctly. Bands: one standard deviation over seeds.",
    ),
    "forgetting": (
        "Forgetting against gain",
        "One point per run. Right of zero: gain. Below zero: forgetting. Crosses: mean and standard deviation.",
    ),
    "lengths": (
        "Retrieval against caption length",
        "The same images and captions, truncated to each length. A flat curve means that further words are not used.",
    ),
}
IDENTITY = ("model", "weights", "method", "backbone", "control", "commit", "seed", "checkpoint", "step", "seconds")
HASHES = ("weights", "commit")  # shortened; the tooltip shows them in full


def write(
    folder: Path,
    groups: Sequence[Group],
    rows: Sequence[Row],
    pictures: Sequence[Path],
    cases: Sequence[Case],
    notes: Sequence[str],
    *,
    coverage: float,
    gain: str,
    kept: str,
) -> Path:
    """Write report.html, with the figures embedded, and return its path.

    Args:
        folder: The folder to write to.
        groups: The groups of runs.
        rows: All rows.
        pictures: Paths of the figures.
        cases: Retrieval examples.
        notes: What could not be checked or shown.
        coverage, gain, kept: As in `compare`.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    results = [result for group in groups for result in group.results]
    main = summary(rows)
    page = environment.get_template("report.html.j2").render(
        groups=groups,
        lettered=[group for group in groups if group.differs],
        colours=[style(i)[0] for i in range(len(groups))],
        sections=sections(rows),
        main=main,
        changed=all(result.before is not None for result in results),
        together=same_start(rows),
        published=any(row.published for row in rows),
        bar=lambda cell, among: bar(cell, reach(among)),
        number=number,
        figures=[(*CAPTIONS[path.stem], data_uri(path)) for path in pictures if path.stem in CAPTIONS],
        cases=[(case, thumbnail(case.image)) for case in cases],
        notes=notes,
        coverage=f"{coverage:.0%}",
        seeds=max(len(group.results) for group in groups),
        gain=gain,
        kept=kept,
        provenance=provenance(groups),
        data=data_hashes(results),
        versions=distinct_values(results, "versions"),
        now=datetime.now().strftime("%Y-%m-%d %H:%M"),
        version=__version__,
    )
    path = folder / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def reach(rows: Sequence[Row]) -> float:
    """Return the largest change or interval end among rows. It is half the width of their bars, which share a scale."""
    cells = [cell for row in rows for cell in (*row.cells, row.difference) if cell is not None and cell.signed]
    return max((abs(value) for cell in cells for value in (cell.mean, *(cell.interval or ()))), default=1.0) or 1.0


def bar(cell: Cell, half: float) -> Markup:
    """Return an svg with a dot for the mean, a line for the interval and a tick at zero.

    Args:
        cell: The change.
        half: The change, in points, at the right end of the bar.
    """

    def x(value: float) -> float:
        return 42 + 38 * value / half

    low, high = cell.interval or (cell.mean, cell.mean)
    return Markup(
        '<svg class="bar{}" viewBox="0 0 84 14" width="84" height="14" aria-hidden="true">'
        '<line class="zero" x1="42" x2="42" y1="0" y2="14"/>'
        '<line class="range" x1="{:.1f}" x2="{:.1f}" y1="7" y2="7"/><circle cx="{:.1f}" cy="7" r="3.5"/></svg>'
    ).format(" sure" if cell.significant else "", x(low), x(high), x(cell.mean))


def data_uri(path: Path) -> str:
    """Return a PNG file as a data uri."""
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def thumbnail(image: Image.Image) -> str:
    """Return an image, scaled to at most 224 px, as a data uri."""
    small = image.convert("RGB")
    small.thumbnail((224, 224), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def provenance(groups: Sequence[Group]) -> dict[str, Any]:
    """Return a table of facts: one row per run, and one column per fact that any file contains.

    A fact that is absent from a file reads "unknown".
    """
    results = [(group, result) for group in groups for result in group.results]
    columns = [key for key in IDENTITY if any(getattr(result.record, key) is not None for _, result in results)]
    absent = {"control": "none"}  # a run without a control has no such value; other absent facts are unknown
    lines = []
    for group, result in results:
        values = []
        for key in columns:
            value = getattr(result.record, key)
            full = absent.get(key, "unknown") if value is None else as_line(value)
            full = f"{value:.0f}" if key == "seconds" and value is not None else full
            values.append((" ".join(word[:10] for word in full.split()) if key in HASHES else full, full))
        lines.append((group.name, str(result.path), values))
    return {"columns": columns, "rows": lines, "missing": [key for key in ("weights", "commit") if key not in columns]}


def as_line(value: Any) -> str:
    """Return a fact as text. A mapping gives its values, and for a value of True its key, as `dirty` of a commit."""
    if not isinstance(value, Mapping):
        return str(value)
    return " ".join(name if part is True else str(part) for name, part in value.items() if part not in (None, False))


def data_hashes(results: Sequence[Result]) -> Mapping[str, list[str]]:
    """Return {benchmark: shortened hashes of its data}, more than one if they differ."""
    names = dict.fromkeys(name.split("/", 1)[0] for result in results for name in result.after)
    by_name = {name: list(dict.fromkeys(filter(None, (result.data(name) for result in results)))) for name in names}
    return {name: [value[:16] for value in values] for name, values in by_name.items() if values}


def distinct_values(results: Sequence[Result], key: str) -> Mapping[str, list[str]]:
    """Return {name: distinct values} of a field that is a mapping, such as `versions`."""
    values: dict[str, dict[str, None]] = {}
    for result in results:
        for name, value in (getattr(result.record, key) or {}).items():
            values.setdefault(name, {})[str(value)] = None
    return {name: list(distinct) for name, distinct in values.items()}
