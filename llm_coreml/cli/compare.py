"""`llm-coreml compare`: results beside each other."""

from __future__ import annotations

from pathlib import Path

import click

from llm_coreml.cli.options import FORMAT, PATH, VERBOSE


@click.command("compare")
@click.argument("results", metavar="A B...", type=PATH, nargs=-1, required=True)
@FORMAT
@VERBOSE
def compare_command(results: tuple[Path, ...], form: str, verbose: bool) -> None:
    """Compare evaluations, each with each.

    Differences come with intervals of 95 %, windows of the text drawn anew in pairs; a star marks
    those that are more than noise. A and B are bundles that were evaluated, or files or folders of
    results, of which the latest counts; of a single folder all results are compared, and cells of
    sweeps that failed are listed.

    \b
    llm-coreml compare out-4bit out-3bit
    """
    from llm_coreml.cli.terminal import terminal

    with terminal(verbose) as screen:
        from llm_coreml.cli.compared_table import compared_table
        from llm_coreml.eval.compared import compare
        from llm_coreml.eval.failed_cells import failures_in
        from llm_coreml.eval.results_file import latest_result, read_results

        alone = len(results) == 1
        found = compare(read_results(results[0]) if alone else list(map(latest_result, results)))
        failures = failures_in(results[0]) if alone else []
        told = {**found.to_json(), "failures": [failure.to_json() for failure in failures]}
        screen.show(form, told, lambda: compared_table(found, failures))
