"""The figures of lm-eval's tasks as a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from llm_coreml.cli.cells import plain

# What stands beside the figures of a task.
_TOLD = ("alias", "name", "sample_len", "sample_count")


def task_table(results: Mapping[str, Any]) -> Table:
    """Return a row for each figure of each task and group of lm-eval's results."""
    table = plain(
        "task", "examples", "filter", "figure", "value", "error", numeric=("value", "error")
    )
    for name, found in {**results["results"], **results.get("groups", {})}.items():
        shots = str(results["n-shot"].get(name, ""))
        for key in sorted(key for key in found if key not in _TOLD and "_stderr," not in key):
            figure, _, kept = key.partition(",")
            error = found.get(f"{figure}_stderr,{kept}")
            table.add_row(name, shots, kept, figure, _shown(found[key]), _shown(error))
    return table


def _shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4f}"
    return "" if value is None or value == "N/A" else str(value)
