"""`llm-coreml report` and `llm-coreml dashboard`: a folder of results as a page."""

from __future__ import annotations

from pathlib import Path

import click

from llm_coreml.cli.options import FORMAT, PATH, VERBOSE

RESULTS = click.argument("results", type=PATH)


@click.command("report")
@RESULTS
@click.option("--output", "-o", type=PATH, required=True, help="The page, such as report.html.")
@click.option("--sample", type=PATH, multiple=True, help="A bundle whose answer is shown; several.")
@click.option("--prompt", help="With --sample: what they answer.")
@FORMAT
@VERBOSE
def report_command(
    results: Path,
    output: Path,
    sample: tuple[Path, ...],
    prompt: str | None,
    form: str,
    verbose: bool,
) -> None:
    """Write one page of many evaluations.

    Quality by size, speed and time, latencies, and a table with all that is known of each result;
    nothing is fetched, and without JavaScript all of it is there. RESULTS is a folder to which
    eval --results appends, or one with bundles. Pictures are an extra:
    pip install 'llm-coreml[report]'.

    \b
    llm-coreml report results -o report.html
    """
    from llm_coreml.cli.terminal import terminal

    if bool(sample) != (prompt is not None):
        raise click.UsageError("--sample and --prompt belong together; give both or none.")
    with terminal(verbose) as screen:
        from llm_coreml.cli.cells import plain
        from llm_coreml.eval.report.page import check_installed, write_report

        check_installed()
        answers = []
        if prompt is not None:
            from llm_coreml.eval.report.samples import answer_of

            screen.progress.stage("answer")
            for done, bundle in enumerate(sample):
                screen.progress.advance(done / len(sample))
                answers.append(answer_of(bundle, prompt))
        found = write_report(results, output, prompt or "", answers)
        table = plain("", "", numeric=())
        told = {
            "page": str(output),
            "results": len(found.rows),
            "left_out": list(found.problems),
            "failures": [failure.to_json() for failure in found.failures],
            "regressions": [row.name for row in found.rows if row.regression is not None],
        }
        table.add_row("page", f"{output}, {len(found.rows)} results")
        for problem in found.problems[:5]:
            table.add_row("left out", problem)
        for failure in found.failures[:5]:
            table.add_row("failed", f"{failure.label}: {failure.sentence}")
        screen.show(form, told, lambda: table)


@click.command("dashboard")
@RESULTS
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8765,
    show_default=True,
    help="Where to listen; 0 takes a free one.",
)
def dashboard_command(results: Path, port: int) -> None:
    """Serve the page of a folder of results, as results land.

    On this machine alone, until it is interrupted.
    """
    from llm_coreml.eval.report.server import serve

    serve(results, port, lambda address: click.echo(f"{address} shows {results}; Ctrl-C ends it."))
