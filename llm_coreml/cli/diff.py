"""`llm-coreml diff`: where two exports part."""

from __future__ import annotations

from pathlib import Path

import click

from llm_coreml.cli.options import (
    DEVICE,
    FORMAT,
    IDS,
    MODE,
    PATH,
    TEXT,
    THRESHOLD,
    UNCHECKED,
    VERBOSE,
)


@click.command("diff")
@click.argument("first", metavar="A", type=PATH)
@click.argument("second", metavar="B", type=PATH)
@TEXT
@IDS
@click.option("--tokens", type=int, default=256, show_default=True, help="Most tokens to read.")
@THRESHOLD
@MODE
@DEVICE
@UNCHECKED
@FORMAT
@VERBOSE
def diff_command(
    first: Path,
    second: Path,
    text: Path | None,
    ids: Path | None,
    tokens: int,
    threshold: float,
    mode: str,
    device: str,
    unchecked: bool,
    form: str,
    verbose: bool,
) -> None:
    """Tell where two exports part, and what it costs.

    Their operations are compared one by one on the same text, then their predictions. A and B are
    bundles or .pte files with the same vocabulary. Errors are relative to A.
    """
    from llm_coreml.cli.terminal import terminal

    with terminal(verbose) as screen:
        from llm_coreml.cli.tables import comparison_table
        from llm_coreml.eval.difference import diff
        from llm_coreml.reference.program.execution import Execution

        found = diff(
            first,
            second,
            text=text,
            ids=ids,
            tokens=tokens,
            execution=Execution(mode, device),
            threshold=threshold,
            checked=not unchecked,
            progress=screen.progress,
        )
        screen.show(form, found.to_json(), lambda: comparison_table(found))
