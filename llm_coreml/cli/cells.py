"""Cells and lines of tables, fit to print whatever they hold; and the table of devices.

table = plain("part", "bytes")
table.add_row("model.pte", "1,024")
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from llm_coreml.printable import CELL, printable

if TYPE_CHECKING:  # it brings torch, which a list does not need
    from llm_coreml.eval.results import DeviceFigures


class _Cells(Table):
    """A table whose cells may hold names from any file."""

    def add_row(self, *cells: Any, **settings: Any) -> None:
        """Add a row of texts."""
        super().add_row(*(printable(cell, CELL) for cell in cells), **settings)


def line(text: str) -> Text:
    """Return a line that may hold names from any file."""
    return Text(printable(text, CELL))


def plain(*columns: str, numeric: Collection[str] = ()) -> Table:
    """Return an empty table without lines.

    Args:
        columns: Titles; without any there is no head.
        numeric: Those of columns of numbers, beside the usual ones.
    """
    table = _Cells(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=any(columns))
    numbers = {"median", "tokens/s", "bytes", "KL", *numeric}
    for number, column in enumerate(columns):
        right = number > 0 and column in numbers
        title = printable(column)
        table.add_column(title, justify="right" if right else "left", overflow="fold")
    return table


def devices_table(found: Sequence[DeviceFigures]) -> Table:
    """Return what devices were found to do, as their runners told."""
    table = plain("device", "runtime", "load", "first token", "tokens/s", "peak memory", "read")
    for device in found:
        speed = device.tokens_per_second
        agree = "" if device.runs_agree else "; its runs differ"
        table.add_row(
            device.name,
            f"ExecuTorch {device.executorch} ({device.runner})",
            f"{device.load_seconds:.2f} s",
            f"{1e3 * device.time_to_first_token_seconds:.1f} ms",
            "" if speed is None else f"{speed:.1f}",
            f"{device.peak_memory_bytes / 1e6:,.0f} MB",
            f"{device.prompt_tokens} + {device.new_tokens} tokens{agree}",
        )
    return table
