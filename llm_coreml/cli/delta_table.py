"""Deltas as tables for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

from llm_coreml.cli.cells import plain

if TYPE_CHECKING:  # they bring torch, which --help does without
    from llm_coreml.bundle.folder import Bundle
    from llm_coreml.delta.delta_record import Measured
    from llm_coreml.delta.making import Delta


def delta_table(delta: Delta) -> Table:
    """Return what a delta takes, and how near its result is."""
    share = delta.bytes / delta.full_bytes
    rows = {
        "delta": f"{delta.folder}, {delta.bytes:,} bytes",
        "full export": f"{delta.full_bytes:,} bytes; the delta takes {share:.1%} of them",
        "program": f"{delta.copied:,} bytes are the base's, {delta.changed:,} in parts that "
        f"differ, {delta.new:,} new",
        **_measured_rows(delta.measured),
    }
    return _rows(rows)


def applied_table(bundle: Bundle) -> Table:
    """Return what base and delta have made."""
    program = bundle.manifest.program
    return _rows(
        {
            "program": f"{bundle.program}, {program.bytes:,} bytes",
            "made of": bundle.manifest.source.name,
            "sha256": f"{program.sha256}, as the delta told",
        }
    )


def _measured_rows(measured: Measured | None) -> dict[str, str]:
    if measured is None:
        return {"compared": "not at all: the program gives the likeliest tokens alone"}
    found = f"mean KL {_nats(measured.mean_kl)}"
    if measured.top1_agreement is not None:
        found += f", {measured.top1_agreement:.2%} the same likeliest token"
    alone = "other tokens" if measured.base_mean_kl is None else _nats(measured.base_mean_kl)
    return {
        "base + delta": f"{found} (reference runtime, from {measured.reference})",
        "base alone": f"mean KL {alone}",
        "text": f"{measured.text}, {measured.tokens:,} tokens",
    }


def _nats(value: float | None) -> str:
    return "is no number" if value is None else f"{value:.5f} nats"


def _rows(rows: dict[str, str]) -> Table:
    table = plain("", "")
    for name, value in rows.items():
        table.add_row(name, value)
    return table
