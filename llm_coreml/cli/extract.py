"""`llm-coreml extract`: the Core ML models of a bundle or a `.pte`, as files."""

from __future__ import annotations

from pathlib import Path

import click

from llm_coreml.cli.options import FORMAT, PATH, UNCHECKED, VERBOSE


@click.command("extract")
@click.argument("artifact", metavar="BUNDLE_OR_PTE", type=PATH)
@click.option("--output", "-o", type=PATH, required=True, help="Folder to make.")
@click.option("--overwrite", is_flag=True, help="Replace an earlier extraction there.")
@UNCHECKED
@FORMAT
@VERBOSE
def extract_command(
    artifact: Path, output: Path, overwrite: bool, unchecked: bool, form: str, verbose: bool
) -> None:
    """Write the .mlpackage of every partition and function.

    Xcode and coremltools open them; models.json says which method runs which function, and in
    which order it gives the inputs.
    """
    from llm_coreml.cli.terminal import terminal

    with terminal(verbose) as screen:
        from llm_coreml.cli.models_table import extraction_table
        from llm_coreml.inspect.extraction import extract

        found = extract(artifact, output, overwrite=overwrite, checked=not unchecked)
        screen.show(form, found.to_json(), lambda: extraction_table(found))
