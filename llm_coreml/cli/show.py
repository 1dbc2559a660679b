"""`llm-coreml show`: what is in a bundle or a `.pte`."""

from __future__ import annotations

from pathlib import Path

import click

from llm_coreml.cli.options import (
    FORMAT,
    PATH,
    UNCHECKED,
    VERBOSE,
)


@click.command("show")
@click.argument("path", type=PATH)
@UNCHECKED
@FORMAT
@VERBOSE
def show_command(path: Path, unchecked: bool, form: str, verbose: bool) -> None:
    """Tell what is in a bundle or a .pte.

    Formats, verification, methods, states, operations, bytes; nothing is run.
    """
    from llm_coreml.cli.terminal import terminal

    with terminal(verbose) as screen:
        from llm_coreml.cli.tables import contents_table
        from llm_coreml.inspect.contents import contents

        found = contents(path, not unchecked)
        screen.show(form, found.to_json(), lambda: contents_table(found))
