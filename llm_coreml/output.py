"""Files and folders that are whole or not there: written beside their place, then renamed.

    with file_beside(Path("out.npz")) as draft:
        draft.write_bytes(content)

    with folder_beside(Path("out"), check) as draft:
        (draft / "model.pte").write_bytes(program)

Whatever ends the block, no draft is left; unless it ends well, what was there before stays.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from llm_coreml.drafts import draft_file, draft_folder, remove_dead, uninterrupted
from llm_coreml.errors import OutputError
from llm_coreml.printable import printable
from llm_coreml.shared_change import SharedChange

# Where less than this can be written, it is no use to write weights.
_LEAST = 1 << 20
_PREVIOUS = "previous"


@contextlib.contextmanager
def file_beside(path: Path) -> Iterator[Path]:
    """Give the path of a draft that takes the place of `path` when the block ends well.

    Raises:
        OSError: the draft cannot be made or renamed.
    """
    with draft_file(path.parent) as draft:
        yield draft
        draft.replace(path)


@contextlib.contextmanager
def folder_beside(output: Path, check: Callable[[Path], None]) -> Iterator[Path]:
    """Give a draft folder beside `output` that becomes `output` when the block ends well.

    Temporary files of the libraries called inside go beside the draft as well, so that nothing is
    left behind whatever ends the block.

    Args:
        output: The folder to make; an earlier one is replaced.
        check: Refuses an `output` that must not be replaced; asked just before it is.

    Raises:
        OutputError: the output cannot be written, or the disk is full.
    """
    try:
        output = output.resolve()
    except (OSError, RuntimeError) as error:  # how Python tells of links in a circle, by version
        raise OutputError(f"'{output}' cannot be written: {error}. Give another -o.") from None
    made = [folder for folder in output.parents if not folder.exists()]
    stack = contextlib.ExitStack()
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        place = stack.enter_context(draft_folder(output.parent, rescue=_put_back))
        draft = place / "draft"
        draft.mkdir()
        with _SCRATCH(output.parent):
            yield draft
        check(output)
        with uninterrupted():
            _replace(output, draft)
    except (OSError, RuntimeError, OutputError) as error:
        failure = _failed_write(error, output)
        if failure is None:
            raise
        raise failure from None
    finally:
        stack.close()
        if not output.exists():
            for folder in made:
                with contextlib.suppress(OSError):
                    folder.rmdir()


def clear_drafts(parent: Path) -> None:
    """Remove what killed processes left in `parent`, and put back what they had taken away."""
    remove_dead(parent, rescue=_put_back)


@contextlib.contextmanager
def _temporary_files_beside(parent: Path) -> Iterator[None]:
    with draft_folder(parent, rescue=_put_back) as folder:
        previous = tempfile.tempdir
        tempfile.tempdir = str(folder)
        try:
            yield
        finally:
            tempfile.tempdir = previous


# `tempfile` has one place for all threads.
_SCRATCH = SharedChange(_temporary_files_beside)


def _replace(output: Path, draft: Path) -> None:
    """Put `draft` in the place of `output`; unless the process is killed, one of the two is there.

    What is replaced lies in the draft's place under its own name until then, so that it can be put
    back even by another process.
    """
    previous = draft.with_name(_PREVIOUS)
    previous.mkdir()
    if output.exists():
        output.rename(previous / output.name)
    try:
        draft.rename(output)
    except BaseException:
        _put_back(draft.parent)
        raise


def _put_back(place: Path) -> None:
    """Put an output back of which only the half was done that takes it away."""
    previous = place / _PREVIOUS
    for folder in list(previous.iterdir()) if previous.is_dir() else ():
        if not (place.parent / folder.name).exists():
            folder.rename(place.parent / folder.name)


def _failed_write(error: Exception, output: Path) -> OutputError | None:
    """Return the error to tell if `error` is about a file in the draft, else None."""
    # A layer below says that its file in the draft failed; the user knows of the output alone.
    cause = error.__context__ if isinstance(error, OutputError) else error
    if not isinstance(cause, (OSError, RuntimeError)):
        return None
    # Libraries in C++, and shutil, report a full disk in words of their own.
    number = getattr(cause, "errno", None)
    if number is None:
        number = _refusal(next(each for each in output.parents if each.exists()))
    if number is not None:
        return output_error(output, OSError(number, str(cause)))
    return output_error(output, cause) if isinstance(cause, OSError) else None


def _refusal(folder: Path) -> int | None:
    """Return the system's number for why `folder` takes nothing more, None if it does."""
    try:
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(bytes(_LEAST))
            probe.flush()
    except OSError as error:
        return error.errno
    return None


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write `value` beside `path` and rename it, so that a reader never sees half of it.

    Raises:
        OutputError: the file cannot be written.
    """
    try:
        with file_beside(path) as draft:
            draft.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
    except OSError as error:
        raise output_error(path, error) from None


def check_name(path: Path) -> None:
    """Refuse the name of an output that is no text, or that a shell should have replaced.

    Raises:
        OutputError: as said.
    """
    if "\0" in str(path):
        raise OutputError(f"'{path}' holds a NUL character, which no name does; give another.")
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise OutputError(
            f"'{path}' is a name that is no text, which formats inside of it need; give another."
        ) from None
    home = path.parts[0] if path.parts else ""
    if home.startswith("~") and not os.path.lexists(home):
        raise OutputError(
            f"'{path}' begins with '{home}', a home folder that the shell does not know; give the "
            "whole path."
        )


def check_replaceable(
    place: Path, overwrite: bool, ours: Callable[[Path], set[str]], foreign: str
) -> None:
    """Refuse a place that holds anything but what is ours, to be replaced.

    Args:
        place: A folder that is to be made.
        overwrite: An earlier one may be replaced.
        ours: Returns the names in an earlier one that were written for it.
        foreign: What a sentence says of other names, such as `which no extraction wrote`.

    Raises:
        OutputError: as said, or the place cannot be read.
    """
    try:
        entries = {entry.name for entry in place.iterdir()}
    except FileNotFoundError:
        return
    except OSError as error:
        raise output_error(place, error) from None
    if not overwrite:
        raise OutputError(
            f"'{place}' exists already; give another -o, or --overwrite to replace it."
        )
    others = sorted(entries - ours(place)) if entries else []
    if others:
        raise OutputError(
            f"'{place}' holds '{printable(others[0], 60)}', {foreign}, so --overwrite leaves the "
            "folder alone; move it away, or give another -o."
        )


def check_writable(folder: Path, name: str) -> None:
    """Refuse a folder into which nothing can be written.

    Args:
        folder: The folder.
        name: The file that belongs there.

    Raises:
        OutputError: as said.
    """
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(
            f"'{folder}' cannot be written to, and {name} belongs there; make it writable or "
            "work on a copy."
        )


def output_error(path: Path, error: OSError) -> OutputError:
    """Say in one sentence why `path` could not be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return OutputError(
            f"The disk that holds '{path}' is full; free some space or give another -o. "
            "Nothing was written."
        )
    return OutputError(f"'{path}' cannot be written: {error.strerror or error}. Give another -o.")
