"""Tables and paths for the screen."""

import os
from io import StringIO
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text


def relative_path(path: Path) -> str:
    """Return a path relative to the working directory, unless it is shorter as it was given."""
    return min(str(path), os.path.relpath(path), key=len)


def plain_table(title: str | None = None) -> Table:
    """Return an empty table with a line below the header and no other lines."""
    return Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)


def one_line(text: str) -> Text:
    """Return a cell that is shortened with an ellipsis, instead of wrapped, where the table is too wide."""
    return Text(text, no_wrap=True, overflow="ellipsis")


def as_text(table: Table) -> str:
    """Return a table as plain text, with the width that it needs."""
    console = Console(file=(buffer := StringIO()), width=1000, color_system=None, markup=False)
    console.print(table)
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()) + "\n"
