"""A small table as text and as HTML: what `print` and a notebook show of a result.

print(PlainTable("out", ("", "value"), (("size", "1,024 bytes"),)))
"""

from __future__ import annotations

import html
from dataclasses import dataclass

from llm_coreml.printable import CELL, printable

_GAP = "  "


@dataclass(frozen=True)
class PlainTable:
    """Rows of text under a title.

    Attributes:
        title: What it is of.
        head: The names of the columns, empty where they need none.
        rows: A text for each column; those of others may hold anything.
    """

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def __str__(self) -> str:
        rows = [[printable(cell, CELL) for cell in row] for row in (self.head, *self.rows)]
        rows = [row for row in rows if any(row)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            _GAP.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        return "\n".join([printable(self.title, CELL), *lines])

    def html(self) -> str:
        """Return the table as HTML, everything in it escaped."""

        def row(cells: tuple[str, ...], tag: str) -> str:
            shown = (html.escape(printable(cell, CELL)) for cell in cells)
            return "<tr>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in shown) + "</tr>"

        head = row(self.head, "th") if any(self.head) else ""
        body = "".join(row(cells, "td") for cells in self.rows)
        title = html.escape(printable(self.title, CELL))
        return f"<table><caption>{title}</caption>{head}{body}</table>"
