"""`llm-coreml eval`: measure a bundle."""

from __future__ import annotations

from pathlib import Path

import click

from llm_coreml.cli.options import (
    DEVICE,
    FORMAT,
    MODE,
    PATH,
    TEXT,
    UNCHECKED,
    VERBOSE,
)


@click.command("eval")
@click.argument("bundle", type=PATH)
@click.option("--model", "-m", metavar="ID_OR_DIR", help="The original, if it was moved.")
@TEXT
@click.option("--tokens", type=int, default=2048, show_default=True, help="Most tokens to score.")
@click.option("--artifact-only", is_flag=True, help="Do not load the original.")
@MODE
@DEVICE
@UNCHECKED
@FORMAT
@VERBOSE
def eval_command(
    bundle: Path,
    model: str | None,
    text: Path | None,
    tokens: int,
    artifact_only: bool,
    mode: str,
    device: str,
    unchecked: bool,
    form: str,
    verbose: bool,
) -> None:
    """Measure an export: quality, latency and size.

    Perplexity, divergence from the original, time of a call, bytes of every part. Runs the program
    inside the .pte on this machine and writes results.json into the folder.
    """
    from llm_coreml.cli.terminal import terminal

    with terminal(verbose) as screen:
        from llm_coreml.cli.tables import evaluation_table
        from llm_coreml.eval.evaluate import evaluate
        from llm_coreml.reference.program.execution import Execution

        result = evaluate(
            bundle,
            model=model,
            text=text,
            tokens=tokens,
            artifact_only=artifact_only,
            execution=Execution(mode, device),
            checked=not unchecked,
            progress=screen.progress,
        )
        screen.show(form, result.to_json(), lambda: evaluation_table(result))
