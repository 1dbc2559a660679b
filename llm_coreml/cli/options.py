"""Options that several commands share, and how a result is printed for machines."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click

from llm_coreml.config.values import read_bytes
from llm_coreml.printable import printable

Command = TypeVar("Command", bound=Callable[..., Any])


class _Path(click.Path):
    """A path, whatever is there; refused only if no file can have such a name."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return `value` as a path."""
        try:
            os.lstat(value)
        except ValueError:
            self.fail("a name holds no NUL character", param, ctx)
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:
                self.fail(f"'{printable(str(value))}' is too long a name.", param, ctx)
        return super().convert(value, param, ctx)


PATH = _Path(path_type=Path)
# As in `reference.program.numerics`, which would bring torch.
MODES = ("declared", "fp32", "strict-fp16")
FORMAT = click.option(
    "--format", "form", type=click.Choice(["human", "json"]), default="human", show_default=True
)
VERBOSE = click.option("--verbose", "-v", is_flag=True, help="Show what the libraries below print.")
UNCHECKED = click.option(
    "--unchecked",
    is_flag=True,
    help="Open a bundle whose files have changed since the export wrote them.",
)
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


def memory(_: click.Context, __: click.Parameter, value: str | None) -> int | None:
    """Return the bytes that a word such as `4GB`, `512MiB` or `4000000` means."""
    if value is None:
        return None
    try:
        return read_bytes(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


def print_json(file: Any, value: Mapping[str, Any]) -> None:
    """Print `value` for machines."""
    click.echo(json.dumps(value, indent=2, sort_keys=True), file=file)
