"""`llm-coreml track`: tell trackers of evaluations that were made before."""

from __future__ import annotations

from pathlib import Path

import click

from llm_coreml.cli.options import FORMAT, PATH, VERBOSE
from llm_coreml.cli.track_options import NAMES, RUN_NAME, failed, read_trackers, tell


@click.command("track")
@click.argument("results", type=PATH, nargs=-1, required=True)
@click.option("--to", metavar=NAMES, multiple=True, required=True, help="The tracker; several.")
@RUN_NAME
@FORMAT
@VERBOSE
def track_command(
    results: tuple[Path, ...], to: tuple[str, ...], run_name: str | None, form: str, verbose: bool
) -> None:
    """Tell trackers of evaluations that were made before, a run for each.

    RESULTS are bundles that were evaluated, or files or folders of results. A tracker is wandb,
    mlflow or trackio, with a project behind a colon if you like, or tensorboard:DIR; where they
    are is what their own environment variables say, such as MLFLOW_TRACKING_URI. Each is an
    extra: pip install 'llm-coreml[wandb]'.

    \b
    llm-coreml track out --to wandb:my-team/exports --to tensorboard:runs
    """
    from llm_coreml.cli.terminal import terminal

    with terminal(verbose) as screen:
        from llm_coreml.bundle.folder import MANIFEST
        from llm_coreml.cli.cells import plain
        from llm_coreml.eval.results_file import read_results
        from llm_coreml.eval.trackers.record import record_of

        trackers = read_trackers(to, screen)
        records = [
            record_of(document, place if (place / MANIFEST).is_file() else None, run_name or "")
            for place in results
            for document in read_results(place)
        ]
        runs, failures = [], {}
        for tracker in trackers:
            told = tell(screen, tracker, records)
            if isinstance(told, str):
                failures[tracker] = told
                continue
            runs += [
                {"tracker": tracker.name, "run": record.name, "where": where}
                for record, where in zip(records, told, strict=True)
            ]
        table = plain("tracker", "run", "where")
        for run in runs:
            table.add_row(*run.values())
        shown = {"runs": runs, "failures": list(failures.values())}
        screen.show(form, shown, lambda: table)
        failure = failed(failures, *results)
        if failure is not None:
            raise failure
