"""`llm-coreml generate`: continue a text."""

from __future__ import annotations

from pathlib import Path

import click

from llm_coreml.cli.options import (
    DEVICE,
    MODE,
    PATH,
    UNCHECKED,
    VERBOSE,
)


@click.command("generate")
@click.argument("bundle", type=PATH)
@click.option("--prompt", "-p", required=True, help="Text to continue.")
@click.option("--max-new-tokens", type=int, default=64, show_default=True)
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 is greedy.")
@click.option("--top-p", type=float, default=1.0, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@MODE
@DEVICE
@UNCHECKED
@VERBOSE
def generate_command(
    bundle: Path,
    prompt: str,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    mode: str,
    device: str,
    unchecked: bool,
    verbose: bool,
) -> None:
    """Continue a text with the program inside the .pte, on this machine."""
    from llm_coreml.cli.terminal import terminal

    with terminal(verbose) as screen:
        from llm_coreml.bundle.language_model import load
        from llm_coreml.reference.program.execution import Execution

        pieces = load(bundle, Execution(mode, device), not unchecked).stream(
            prompt, max_new_tokens, temperature=temperature, top_p=top_p, seed=seed
        )
        for piece in pieces:
            click.echo(piece, file=screen.result.file, nl=False)
        click.echo(file=screen.result.file)
