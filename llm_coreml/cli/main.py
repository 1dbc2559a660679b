"""The command line: options in, calls of the library, a table or JSON out.

    llm-coreml export llama --bits 4 -o out
    llm-coreml eval out --format json

Results go to stdout, everything else to stderr; exit codes are those of `errors`. Heavy imports
happen inside the commands, so that `--help` is quick.
"""

from __future__ import annotations

import contextlib
import io
import sys
import traceback
from collections.abc import Iterator
from typing import Any

import click

from llm_coreml.cli.compare import compare_command
from llm_coreml.cli.delta import apply_command, delta_command
from llm_coreml.cli.diff import diff_command
from llm_coreml.cli.eval import eval_command
from llm_coreml.cli.export import export_command
from llm_coreml.cli.extract import extract_command
from llm_coreml.cli.generate import generate_command
from llm_coreml.cli.inspect import inspect_command
from llm_coreml.cli.listing import ls_command
from llm_coreml.cli.lm_eval import lm_eval_command
from llm_coreml.cli.process import INTERRUPTION, check_folder
from llm_coreml.cli.push import push_command
from llm_coreml.cli.report import dashboard_command, report_command
from llm_coreml.cli.run import run_command
from llm_coreml.cli.show import show_command
from llm_coreml.cli.sweep import sweep_command
from llm_coreml.cli.track import track_command
from llm_coreml.errors import LlmCoreMLError
from llm_coreml.machine import collect_rarely, keep_one_heap
from llm_coreml.printable import MESSAGE, printable


def _plain_names(name: str) -> str:
    return name.replace("_", "-")  # click has taken the leading hyphens off


class _Verbs(click.Group):
    """Verbs that hand an interruption on; click would print first, and wait for a reader."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse what stands before the verb, and print help."""
        with _handed_on():
            return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Call the verb."""
        with _handed_on():
            return super().invoke(ctx)


@contextlib.contextmanager
def _handed_on() -> Iterator[None]:
    try:
        yield
    except (EOFError, KeyboardInterrupt) as error:
        raise click.Abort from error


@click.group(
    cls=_Verbs,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "token_normalize_func": _plain_names,
        "max_content_width": 100,
    },
)
@click.version_option(package_name="llm-coreml")
def cli() -> None:
    """Export Hugging Face causal LMs to Core ML .pte files, and prove the result off-device.

    \b
    Exit codes: 0 done, 1 other error, 2 usage, 3 gate, 4 checkpoint, 5 unsupported, 6 output,
    7 artifact, 8 verification, 9 system, 10 gate without a figure, 11 failed cells of a sweep, 12
    tracker, 130 interrupted (129 by SIGHUP, 143 by SIGTERM).
    """
    check_folder()


for command in (
    export_command,
    eval_command,
    lm_eval_command,
    generate_command,
    show_command,
    ls_command,
    diff_command,
    compare_command,
    sweep_command,
    report_command,
    dashboard_command,
    track_command,
    push_command,
    inspect_command,
    run_command,
    extract_command,
    delta_command,
    apply_command,
):
    cli.add_command(command)


def main() -> None:
    """Run the command line and exit with its code."""
    keep_one_heap()
    collect_rarely()
    try:
        code = cli.main(standalone_mode=False) or 0
        INTERRUPTION.finish()
    except SystemExit as ended:  # click's way when nobody reads what is printed any more
        code = ended.code
    except BaseException as error:
        code = _tell(error)
    if code:
        # Open temporary files of a failed library find their folder gone; nobody needs to know.
        sys.unraisablehook = lambda _: None
    sys.exit(code)


def _tell(error: BaseException) -> int:
    """Print what ended a command in a sentence, and return the exit code."""
    interrupted = isinstance(error, (click.Abort, KeyboardInterrupt))
    # Libraries make errors of their own of what interrupts them.
    if interrupted or INTERRUPTION.number is not None:
        code, done, kept = INTERRUPTION.code, INTERRUPTION.over, INTERRUPTION.kept
        INTERRUPTION.finish()
        _print("\nInterrupted while the result was printed." if done else f"\nInterrupted; {kept}.")
        return code
    INTERRUPTION.finish()
    if isinstance(error, click.ClickException):
        _print(_usage(error))
        return error.exit_code
    if isinstance(error, LlmCoreMLError):
        _print(f"Error: {error}")
        return error.exit_code
    if "-v" in sys.argv or "--verbose" in sys.argv:
        with contextlib.suppress(OSError):
            traceback.print_exception(error)
    _print(f"Error: {_unforeseen(error)}")
    return 1


def _print(text: str) -> None:
    """Print to stderr, if there is anybody to read it."""
    with contextlib.suppress(OSError, KeyboardInterrupt), INTERRUPTION.telling():
        click.echo(text, err=True)


def _usage(error: click.ClickException) -> str:
    """Return what click has to say; its message may quote what the user wrote."""
    with io.StringIO() as shown:
        error.show(shown)
        usage, mark, message = shown.getvalue().rstrip().partition("Error: ")
    return usage + mark + printable(message, MESSAGE)


def _unforeseen(error: BaseException) -> str:
    """Return a sentence about what nobody foresaw."""
    told = printable(str(error), MESSAGE)
    if isinstance(error, MemoryError):
        return (
            f"the machine's memory is not enough{f' ({told})' if told else ''}. Close other "
            "programs, or give a smaller model."
        )
    if isinstance(error, UnicodeEncodeError) and "surrogates" in error.reason:
        return f"'{printable(str(error.object))}' is a name that is no text; give another to it."
    if isinstance(error, OSError) and error.strerror:
        where = f"'{printable(str(error.filename))}': " if error.filename else ""
        return f"{where}{error.strerror}. The system refuses it; run again with -v to see where."
    return (
        f"an unexpected {type(error).__name__} in llm-coreml: {told}. Run again with -v for the "
        "traceback, and please report it."
    )
