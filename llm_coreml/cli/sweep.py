"""`llm-coreml sweep`: many exports and their evaluations."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llm_coreml.cli.options import FORMAT, PATH, VERBOSE
from llm_coreml.cli.process import INTERRUPTION
from llm_coreml.errors import SweepError

if TYPE_CHECKING:
    from llm_coreml.eval.sweep.swept import Swept


@click.command("sweep")
@click.argument("file", metavar="FILE", type=PATH)
@click.option(
    "--results",
    "-o",
    type=PATH,
    default=Path("results"),
    show_default=True,
    metavar="DIR",
    help="Folder of the results, which report and dashboard read.",
)
@click.option(
    "--jobs", "-j", type=int, default=1, show_default=True, help="Cells that run at once."
)
@click.option(
    "--ray",
    metavar="ADDRESS",
    help="Run cells on this Ray cluster; auto finds one, local starts one.",
)
@click.option("--keep", is_flag=True, help="Keep the bundles of cells, too.")
@click.option("--retry-failed", is_flag=True, help="Try cells again that have failed.")
@click.option("--limit", type=int, metavar="N", help="Try at most N of the missing cells.")
@click.option("--dry-run", is_flag=True, help="Run nothing; list all cells and how they stand.")
@click.option(
    "--cache",
    type=PATH,
    help="Keep quantized weights here.  [default: $LLM_COREML_CACHE or ~/.cache/llm-coreml]",
)
@FORMAT
@VERBOSE
def sweep_command(
    file: Path,
    results: Path,
    jobs: int,
    ray: str | None,
    keep: bool,
    retry_failed: bool,
    limit: int | None,
    dry_run: bool,
    cache: Path | None,
    form: str,
    verbose: bool,
) -> None:
    """Export and evaluate models in many formats.

    FILE is YAML that names models, formats, targets and values of any setting; each combination is
    a cell, with a process of its own. What is in the results already is not run again, so that an
    interrupted sweep goes on. Cells that fail are kept beside the others, and the command then
    ends with exit code 11.

    \b
    llm-coreml sweep sweep.yaml --dry-run
    llm-coreml sweep sweep.yaml --jobs 2
    llm-coreml report results -o report.html
    """
    from llm_coreml.cli.terminal import terminal

    if ray is not None and jobs != 1:
        raise click.UsageError("--jobs is for this machine, and --ray for a cluster; give one.")
    with terminal(verbose) as screen:
        from llm_coreml.eval.sweep.sweeping import sweep

        INTERRUPTION.kept = "cells that have ended are kept, and the same command goes on from them"
        swept = sweep(
            file,
            results=results,
            jobs=jobs,
            ray=ray,
            keep=keep,
            retry_failed=retry_failed,
            limit=limit,
            plan=dry_run,
            cache=cache or True,
            progress=screen.progress,
        )
        screen.show(form, swept.to_json(), lambda: _table(swept))
        _judge(swept, results, dry_run)


def _table(swept: Swept) -> Any:
    from rich.console import Group

    from llm_coreml.cli.cells import line, plain

    table = swept.table()
    shown = plain(*table.head, numeric=table.head[2:-1])
    for row in table.rows:
        shown.add_row(*row)
    return Group(line(table.title), shown)


def _judge(swept: Swept, results: Path, dry_run: bool) -> None:
    """End with an error if cells have failed."""
    failures = swept.failures
    if failures and not dry_run:
        first = failures[0]
        sentence = "" if first.outcome is None else first.outcome.sentence
        raise SweepError(
            f"{len(failures)} of {len(swept.cells)} cells have failed, and the others are in "
            f"'{results}'; --retry-failed tries them again. The first, '{first.label}': {sentence}"
        )
