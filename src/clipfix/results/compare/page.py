"""report.html: one file with everything in it, which opens offline, on a phone and in print."""

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
from clipfix.results.compare.rows import Cell, Row, number, one_start, sections, summary

CAPTIONS = {
    "radar": (
        "The nine patterns of look-alike pairs",
        "Percent of pairs told apart. Bands: one standard deviation over seeds.",
    ),
    "forgetting": (
        "Forgetting against gain",
        "Each run a point. To the right: repaired. Below zero: forgotten. Crosses: mean and standard deviation.",
    ),
    "lengths": (
        "Retrieval against caption length",
        "The same pictures and captions, cut after so many tokens. A flat line is a model that reads no further.",
    ),
}
IDENTITY = ("model", "weights", "method", "backbone", "control", "commit", "seed", "checkpoint", "step", "seconds")
HASHES = ("weights", "commit")  # shown short, whole in the title


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
    """The page of one comparison; pictures become part of it."""
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
        together=one_start(rows),
        published=any(row.published for row in rows),
        bar=lambda cell, among: bar(cell, reach(among)),
        number=number,
        figures=[(*CAPTIONS[path.stem], inlined(path)) for path in pictures if path.stem in CAPTIONS],
        cases=[(case, thumbnail(case.image)) for case in cases],
        notes=notes,
        coverage=f"{coverage:.0%}",
        seeds=max(len(group.results) for group in groups),
        gain=gain,
        kept=kept,
        provenance=provenance(groups),
        data=hashes(results),
        versions=shared(results, "versions"),
        now=datetime.now().strftime("%Y-%m-%d %H:%M"),
        version=__version__,
    )
    path = folder / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def reach(rows: Sequence[Row]) -> float:
    """The largest change or bound among rows: half the width of their bars, so that bars can be compared."""
    cells = [cell for row in rows for cell in (*row.cells, row.difference) if cell is not None and cell.signed]
    return max((abs(value) for cell in cells for value in (cell.mean, *(cell.interval or ()))), default=1.0) or 1.0


def bar(cell: Cell, half: float) -> Markup:
    """A dot for the mean, a line for the interval, a tick at zero."""

    def x(value: float) -> float:
        return 42 + 38 * value / half

    low, high = cell.interval or (cell.mean, cell.mean)
    return Markup(
        '<svg class="bar{}" viewBox="0 0 84 14" width="84" height="14" aria-hidden="true">'
        '<line class="zero" x1="42" x2="42" y1="0" y2="14"/>'
        '<line class="range" x1="{:.1f}" x2="{:.1f}" y1="7" y2="7"/><circle cx="{:.1f}" cy="7" r="3.5"/></svg>'
    ).format(" sure" if cell.sure else "", x(low), x(high), x(cell.mean))


def inlined(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def thumbnail(image: Image.Image) -> str:
    """A picture of at most 224 px as a data uri."""
    small = image.convert("RGB")
    small.thumbnail((224, 224), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def provenance(groups: Sequence[Group]) -> dict[str, Any]:
    """A column per fact that any file tells, a row per run; what a file does not tell reads "unknown"."""
    results = [(group, result) for group in groups for result in group.results]
    told = [key for key in IDENTITY if any(getattr(result.record, key) is not None for _, result in results)]
    # An absent control means none; of the other facts, absence means that nobody knows.
    absent = {"control": "none"}
    lines = []
    for group, result in results:
        values = []
        for key in told:
            value = getattr(result.record, key)
            whole = (
                absent.get(key, "unknown") if value is None else f"{value:.0f}" if key == "seconds" else words(value)
            )
            values.append((" ".join(word[:10] for word in whole.split()) if key in HASHES else whole, whole))
        lines.append((group.name, str(result.path), values))
    return {"columns": told, "rows": lines, "missing": [key for key in ("weights", "commit") if key not in told]}


def words(value: Any) -> str:
    """A fact in a line; of one with parts (weights before and after; a commit, dirty or not) what they say."""
    if not isinstance(value, Mapping):
        return str(value)
    return " ".join(name if part is True else str(part) for name, part in value.items() if part not in (None, False))


def hashes(results: Sequence[Result]) -> Mapping[str, list[str]]:
    """What tells the data of each benchmark."""
    names = dict.fromkeys(name.split("/", 1)[0] for result in results for name in result.after)
    found = {name: list(dict.fromkeys(filter(None, (result.data(name) for result in results)))) for name in names}
    return {name: [value[:16] for value in values] for name, values in found.items() if values}


def shared(results: Sequence[Result], key: str) -> Mapping[str, list[str]]:
    """What files tell by name (hashes of data, versions of libraries): the values, more than one where runs differ."""
    found: dict[str, dict[str, None]] = {}
    for result in results:
        for name, value in (getattr(result.record, key) or {}).items():
            found.setdefault(name, {})[str(value)] = None
    return {name: list(values) for name, values in found.items()}
