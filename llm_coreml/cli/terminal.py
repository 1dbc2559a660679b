"""What a person sees: progress on stderr, results on stdout, nobody else's chatter.

Inside `with terminal(verbose=False) as screen`, work is given `screen.progress`, and what it found
is printed by `screen.show`.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Console, RenderableType

from llm_coreml.cli.options import print_json
from llm_coreml.cli.process import INTERRUPTION, own_temporary_files
from llm_coreml.cli.stages import Stages
from llm_coreml.drafts import uninterrupted
from llm_coreml.errors import OutputError
from llm_coreml.quiet import loud

# Columns of a table, where $COLUMNS leaves no room for one.
_NARROWEST, _WIDTH = 20, 80


@dataclass(frozen=True)
class Screen:
    """Where a command writes.

    Attributes:
        result: Console on stdout.
        progress: Listener that draws on stderr.
    """

    result: Console
    progress: Stages

    def show(
        self, form: str, value: Mapping[str, Any], table: Callable[[], RenderableType]
    ) -> None:
        """Print what a command found, and end its progress.

        Args:
            form: `json` for machines, or `human`.
            value: The result for machines.
            table: Makes the one for people.
        """
        INTERRUPTION.finish()
        shown = None if form == "json" else table()
        with INTERRUPTION.telling():
            self.progress.close()
            if shown is None:
                print_json(self.result.file, value)
            else:
                self.result.print(shown)


class _Results(io.TextIOWrapper):
    """A stream for results: whoever asked for them must know that they are not there."""

    def write(self, text: str) -> int:
        """Write, and say in a sentence why it cannot be done."""
        with _told():
            return super().write(text)

    def flush(self) -> None:
        """Flush, and say in a sentence why it cannot be done."""
        with _told():
            super().flush()


@contextlib.contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputError(f"The result cannot be printed: {error.strerror}.") from None


class _Notices(io.TextIOWrapper):
    """A stream for progress, which goes on when nobody can read it."""

    def write(self, text: str) -> int:
        """Write if it can be done."""
        with contextlib.suppress(OSError):
            return super().write(text)
        return len(text)

    def flush(self) -> None:
        """Flush if it can be done."""
        with contextlib.suppress(OSError):
            super().flush()


@contextlib.contextmanager
def terminal(verbose: bool) -> Iterator[Screen]:
    """Give a screen; unless `verbose`, everything else that is printed meanwhile is dropped.

    torch, coremltools and ExecuTorch print from Python and from C++, so the process's own
    descriptors are pointed elsewhere, and the screen writes to copies of them.

    Raises:
        OutputError: what is printed as a result cannot be written.
    """
    sys.stdout.flush()
    _flush_notices()
    saved = [os.dup(1), os.dup(2)]
    # What a terminal's encoding lacks is printed as its escape.
    out, err = (
        kind(os.fdopen(os.dup(copy), "wb"), errors="backslashreplace", line_buffering=True)
        for kind, copy in zip((_Results, _Notices), saved, strict=True)
    )
    console = Console(file=out, highlight=False, soft_wrap=True, markup=False)
    if console.width < _NARROWEST:
        console.width = _WIDTH
    screen = Screen(console, Stages(err))
    finished = False
    try:
        with _hidden(verbose), own_temporary_files():
            yield screen
        finished = True
    finally:
        try:
            with INTERRUPTION.telling():
                screen.progress.close(finished)
                for file in () if INTERRUPTION.unread else (err, out):
                    with contextlib.suppress(OSError, OutputError):
                        file.flush()
        finally:
            with uninterrupted():
                sys.stdout.flush()
                _flush_notices()
                for copy, descriptor in zip(saved, (1, 2), strict=True):
                    os.dup2(copy, descriptor)
                    os.close(copy)
                for file in (out, err):
                    _close(file)


def _close(file: io.TextIOWrapper) -> None:
    """Close a stream; what it holds for a reader who does not read would be waited for."""
    if INTERRUPTION.unread:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, file.fileno())
        os.close(nowhere)
        return
    with contextlib.suppress(OSError, OutputError):
        file.close()


def _flush_notices() -> None:
    with contextlib.suppress(OSError):
        sys.stderr.flush()


@contextlib.contextmanager
def _hidden(verbose: bool) -> Iterator[None]:
    if verbose:
        # Results alone belong on stdout, whoever else writes there.
        os.dup2(2, 1)
        with loud():
            yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    os.close(nowhere)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        previous = logging.root.manager.disable
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(previous)
