"""The command line: options in, calls of the library, a table or JSON out.

    llm-coreml export llama --bits 4 -o out
    llm-coreml eval out --format json

Results go to stdout, everything else to stderr; exit codes are those of `errors`. Heavy imports
happen inside the commands, so that `--help` is quick.
"""

from __future__ import annotations

import io
import sys
import traceback

import click

from llm_coreml.cli.diff import diff_command
from llm_coreml.cli.eval import eval_command
from llm_coreml.cli.export import export_command
from llm_coreml.cli.generate import generate_command
from llm_coreml.cli.inspect import inspect_command
from llm_coreml.cli.listing import ls_command
from llm_coreml.cli.run import run_command
from llm_coreml.cli.show import show_command
from llm_coreml.errors import LlmCoreMLError
from llm_coreml.machine import keep_one_heap
from llm_coreml.printable import MESSAGE, printable


def _plain_names(name: str) -> str:
    return name.replace("_", "-")  # click has taken the leading hyphens off


@click.group(
    context_settings={
        "help_option_names": ["-h", "--help"],
        "token_normalize_func": _plain_names,
        "max_content_width": 100,
    }
)
@click.version_option(package_name="llm-coreml")
def cli() -> None:
    """Export Hugging Face causal LMs to Core ML .pte files, and prove the result off-device.

    \b
    Exit codes: 0 done, 1 other error, 2 usage, 4 checkpoint, 5 unsupported, 6 output,
    7 artifact, 8 verification, 130 interrupted.
    """


for command in (
    export_command,
    eval_command,
    generate_command,
    show_command,
    ls_command,
    diff_command,
    inspect_command,
    run_command,
):
    cli.add_command(command)


def main() -> None:
    """Run the command line and exit with its code."""
    keep_one_heap()
    try:
        code = cli.main(standalone_mode=False) or 0
    except click.ClickException as error:
        _show(error)
        code = error.exit_code
    except LlmCoreMLError as error:
        click.echo(f"Error: {error}", err=True)
        code = error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("Interrupted; nothing was written.", err=True)
        code = 130
    except Exception as error:
        if "-v" in sys.argv or "--verbose" in sys.argv:
            traceback.print_exc()
        click.echo(
            f"Error: an unexpected {type(error).__name__} in llm-coreml: "
            f"{printable(str(error), MESSAGE)}. Run again with -v for the traceback, and please "
            "report it.",
            err=True,
        )
        code = 1
    if code:
        # Open temporary files of a failed library find their folder gone; nobody needs to know.
        sys.unraisablehook = lambda _: None
    sys.exit(code)


def _show(error: click.ClickException) -> None:
    """Print what click has to say; its message may quote what the user wrote."""
    with io.StringIO() as shown:
        error.show(shown)
        usage, mark, message = shown.getvalue().rstrip().partition("Error: ")
    click.echo(usage + mark + printable(message, MESSAGE), err=True)
