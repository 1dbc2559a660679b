"""`llm-coreml delta` and `llm-coreml apply`: many fine-tunes of one base, shipped once."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click

from llm_coreml.cli.options import FORMAT, PATH, TEXT, VERBOSE

_OUTPUT = click.option("--output", "-o", type=PATH, required=True, help="Folder to make.")


@click.command("delta")
@click.argument("base", type=PATH)
@click.argument("tuned", metavar="TUNED")
@_OUTPUT
@click.option("--overwrite", is_flag=True, help="Replace an earlier delta there.")
@TEXT
@click.option("--tokens", type=int, default=256, show_default=True, help="Most tokens to score.")
@click.option("--max-kl", type=float, help="Gate: largest mean KL from TUNED, in nats.")
@click.option(
    "--adapters",
    type=click.Choice(["merged", "beside"]),
    help="Of a model that is exported: as with export.  [default: as the base]",
)
@click.option(
    "--keep-codes",
    is_flag=True,
    help="Of a model that is exported: keep the base's codes, and fit scales and tables.",
)
@FORMAT
@VERBOSE
def delta_command(
    base: Path,
    tuned: str,
    output: Path,
    overwrite: bool,
    text: Path | None,
    tokens: int,
    max_kl: float | None,
    adapters: Literal["merged", "beside"] | None,
    keep_codes: bool,
    form: str,
    verbose: bool,
) -> None:
    """Write what a fine-tune changes of a base.

    BASE is a bundle. TUNED is another one, or a folder, an adapter or a hub id, which is exported
    with the base's settings. Base and delta together are run before anything is written, and give
    TUNED's export byte by byte.

    \b
    llm-coreml delta base tuned -o delta
    llm-coreml delta base ./my-lora -o delta --adapters beside --max-kl 0.05
    llm-coreml delta base ./tuned -o delta --keep-codes --max-kl 0.05
    llm-coreml apply base delta -o tuned
    """
    from llm_coreml.cli.terminal import terminal

    with terminal(verbose) as screen:
        from llm_coreml.cli.delta_table import delta_table
        from llm_coreml.delta.making import make_delta

        found = make_delta(
            base,
            tuned,
            output=output,
            text=text,
            tokens=tokens,
            max_kl=max_kl,
            adapters=adapters,
            keep_codes=keep_codes,
            overwrite=overwrite,
            progress=screen.progress,
        )
        screen.show(form, found.to_json(), lambda: delta_table(found))


@click.command("apply")
@click.argument("base", type=PATH)
@click.argument("delta", type=PATH)
@_OUTPUT
@click.option("--overwrite", is_flag=True, help="Replace an earlier export there.")
@FORMAT
@VERBOSE
def apply_command(
    base: Path, delta: Path, output: Path, overwrite: bool, form: str, verbose: bool
) -> None:
    """Write the bundle that a delta makes of its base."""
    from llm_coreml.cli.terminal import terminal

    with terminal(verbose) as screen:
        from llm_coreml.cli.delta_table import applied_table
        from llm_coreml.delta.applying import apply_delta

        bundle = apply_delta(base, delta, output=output, overwrite=overwrite)
        told = {"folder": str(bundle.folder), **bundle.manifest.to_json()}
        screen.show(form, told, lambda: applied_table(bundle))
