"""Options that several commands share, and how a result is printed for machines."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., Any])

PATH = click.Path(path_type=Path)
# As in `reference.program.numerics`, which would bring torch.
MODES = ("declared", "fp32", "strict-fp16")
FORMAT = click.option(
    "--format", "form", type=click.Choice(["human", "json"]), default="human", show_default=True
)
VERBOSE = click.option("--verbose", "-v", is_flag=True, help="Show what the libraries below print.")
DEVICE = click.option(
    "--device", default="cpu", show_default=True, help="Where to compute: cpu, cuda, cuda:1, mps."
)
MODE = click.option(
    "--mode",
    type=click.Choice(MODES),
    default="declared",
    show_default=True,
    help="Numerics: round as the program declares, not at all, or after every addition.",
)
TEXT = click.option("--text", type=PATH, help="UTF-8 file; else the bundled text.")
IDS = click.option("--ids", type=PATH, help="File of tokens to read instead of a text.")
THRESHOLD = click.option(
    "--threshold",
    type=float,
    default=1e-2,
    show_default=True,
    help="Relative error from which operations count as parted.",
)
_UNITS = {
    "": 1,
    **{letter: 1000 ** (power + 1) for power, letter in enumerate("kmgt")},
    **{f"{letter}i": 1024 ** (power + 1) for power, letter in enumerate("kmgt")},
}


def memory(_: click.Context, __: click.Parameter, value: str | None) -> int | None:
    """Return the bytes that a word such as `4GB`, `512MiB` or `4000000` means."""
    if value is None:
        return None
    found = re.fullmatch(r"(\d{1,15}(?:\.\d{1,15})?) ?([kmgt]i?)?b?", value.strip().lower())
    if found is None:
        raise click.BadParameter(f"'{value}' is no number of bytes such as 4GB or 512MiB.")
    return int(float(found[1]) * _UNITS[found[2] or ""])


def print_json(file: Any, value: dict[str, Any]) -> None:
    """Print `value` for machines."""
    click.echo(json.dumps(value, indent=2, sort_keys=True), file=file)
