"""Results beside each other as a table for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.text import Text

from llm_coreml.cli.cells import line, plain

if TYPE_CHECKING:  # numpy, which a list does not need
    from llm_coreml.eval.compared import Compared, Difference, Figure
    from llm_coreml.eval.failed_cells import Failure

_SIGNS = {True: "*", False: "", None: ""}


def compared_table(found: Compared, failures: Sequence[Failure] = ()) -> Group:
    """Return a row for each result, its differences from the first below it, and what is noise.

    Args:
        found: Results beside each other.
        failures: Cells of a sweep that have none.
    """
    from llm_coreml.eval.compared import FIGURES

    shown = [each for each in FIGURES if any(v is not None for v in found.figures[each.name])]
    labels = [figure.label for figure in shown]
    table = plain("", "result", *labels, numeric=labels)
    for at, name in enumerate(found.names):
        values = [(figure, found.figures[figure.name][at]) for figure in shown]
        cells = ["" if value is None else format(value, figure.format) for figure, value in values]
        table.add_row(str(at + 1), name, *cells)
        if at:
            differences = found.between(0, at)
            told = [_told(figure, differences.get(figure.name)) for figure in shown]
            table.add_row("", "  less result 1", *told)
            spans = [_span(figure, differences.get(figure.name)) for figure in shown]
            table.add_row("", "  95 % interval", *spans)
    failed = [line(f"failed: {each.label}: {each.sentence}") for each in failures]
    return Group(table, Text(""), *_remarks(found), *failed)


def _told(figure: Figure, difference: Difference | None) -> str:
    if difference is None:
        return ""
    return f"{_signed(figure, difference.value)}{_SIGNS[difference.beyond_noise]}"


def _span(figure: Figure, difference: Difference | None) -> str:
    if difference is None or difference.interval is None:
        return ""
    low, high = difference.interval
    return f"{_signed(figure, low)} to {_signed(figure, high)}"


def _signed(figure: Figure, value: float) -> str:
    return format(value, "+.2%" if figure.relative else f"+{figure.format}")


def _remarks(found: Compared) -> list[Any]:
    """Return which results cannot be told apart, and what was not compared."""
    same: dict[str, list[str]] = {}
    for each in found.differences:
        if each.beyond_noise is False:
            same.setdefault(each.figure, []).append(f"{each.first + 1} and {each.second + 1}")
    judged = any(each.beyond_noise is not None for each in found.differences)
    lines = [f"within noise in {figure}: {', '.join(pairs)}" for figure, pairs in same.items()]
    if judged:
        lines.insert(0, "* more than noise: the interval does not hold 0")
    return [line(text) for text in (*lines, *found.notes)]
