"""`llm-coreml inspect`: watch a program's values, or tell which systems run it."""

from __future__ import annotations

from pathlib import Path

import click

from llm_coreml.cli.options import (
    DEVICE,
    FORMAT,
    IDS,
    MODES,
    PATH,
    TEXT,
    THRESHOLD,
    UNCHECKED,
    VERBOSE,
)


@click.command("inspect")
@click.argument("artifact", metavar="BUNDLE_OR_PTE", type=PATH)
@click.option("--compatibility", is_flag=True, help="Tell which systems run it, and why.")
@click.option("--minimum-os", help="With --compatibility: refuse what this system does not run.")
@click.option("--numerics", is_flag=True, help="Run the program and watch its values.")
@TEXT
@IDS
@click.option("--tokens", type=int, default=64, show_default=True, help="Most tokens to read.")
@click.option(
    "--against",
    type=click.Choice([*MODES[1:], "none"]),
    default="fp32",
    show_default=True,
    help="Numerics to compare with; strict-fp16 is slow, give it few tokens.",
)
@THRESHOLD
@click.option("--top", type=int, default=10, show_default=True, help="Values to list by size.")
@DEVICE
@UNCHECKED
@FORMAT
@VERBOSE
def inspect_command(
    artifact: Path,
    compatibility: bool,
    minimum_os: str | None,
    numerics: bool,
    text: Path | None,
    ids: Path | None,
    tokens: int,
    against: str,
    threshold: float,
    top: int,
    device: str,
    unchecked: bool,
    form: str,
    verbose: bool,
) -> None:
    """Watch a program's values while it reads text, or tell which systems run it.

    \b
    --numerics tells
      where inf and NaN begin,
      which values come closest to fp16's largest number,
      how the error of rounding to fp16 grows from layer to layer.
    --compatibility tells, also of a .mlpackage,
      which system a program is written for, and the oldest that has all that it uses,
      which operations and types ask for that.
    """
    if numerics == compatibility:
        raise click.UsageError("Say what to inspect: --numerics or --compatibility.")
    if minimum_os is not None and not compatibility:
        raise click.UsageError("--minimum-os belongs to --compatibility.")
    if compatibility:
        _tell_of_systems(artifact, minimum_os, not unchecked, form, verbose)
        return
    from llm_coreml.cli.terminal import terminal

    with terminal(verbose) as screen:
        from llm_coreml.cli.tables import inspection_table
        from llm_coreml.eval.inspection import inspect_numerics

        found = inspect_numerics(
            artifact,
            text=text,
            ids=ids,
            tokens=tokens,
            against=None if against == "none" else against,
            device=device,
            threshold=threshold,
            top=top,
            checked=not unchecked,
            progress=screen.progress,
        )
        screen.show(form, found.to_json(), lambda: inspection_table(found))


def _tell_of_systems(
    artifact: Path, minimum_os: str | None, checked: bool, form: str, verbose: bool
) -> None:
    from llm_coreml.cli.terminal import terminal

    with terminal(verbose) as screen:
        from llm_coreml.cli.tables import systems_table
        from llm_coreml.inspect.systems_of import check_system, systems_json, systems_of

        if minimum_os is None:
            found = systems_of(artifact, checked)
        else:
            found = check_system(artifact, minimum_os, checked)
        screen.show(form, systems_json(found), lambda: systems_table(found))
