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
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from llm_coreml.errors import OutputError

# Where in a draft the temporary files of libraries go.
SCRATCH = ".scratch"
# Less than this is a full disk to whoever writes weights.
_FULL_DISK = 1 << 20


@contextlib.contextmanager
def file_beside(path: Path) -> Iterator[Path]:
    """Give the path of a draft that takes the place of `path` when the block ends well.

    Raises:
        OSError: the draft cannot be renamed.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield draft
        draft.replace(path)
    finally:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)


@contextlib.contextmanager
def folder_beside(output: Path, check: Callable[[Path], None]) -> Iterator[Path]:
    """Give a draft folder beside `output` that becomes `output` when the block ends well.

    Temporary files of the libraries called inside go into the draft as well, so that nothing is
    left behind whatever ends the block.

    Args:
        output: The folder to make; an earlier one is replaced.
        check: Refuses an `output` that must not be replaced; asked just before it is.

    Raises:
        OutputError: the output cannot be written, or the disk is full.
    """
    output = output.resolve()
    draft: Path | None = None
    previous = tempfile.tempdir
    made = [folder for folder in output.parents if not folder.exists()]
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
        scratch = draft / SCRATCH
        scratch.mkdir()
        tempfile.tempdir = str(scratch)
        yield draft
        shutil.rmtree(scratch)
        draft.chmod(0o755)
        check(output)
        _replace(output, draft)
    except (OSError, RuntimeError, OutputError) as error:
        failure = _failed_write(error, output, draft)
        if failure is None:
            raise
        raise failure from None
    finally:
        tempfile.tempdir = previous
        if draft is not None:
            shutil.rmtree(draft, ignore_errors=True)
        if not output.exists():
            for folder in made:
                with contextlib.suppress(OSError):
                    folder.rmdir()


def _replace(output: Path, draft: Path) -> None:
    """Put `draft` in the place of `output`; whatever interrupts it, one of the two is there."""
    old = draft.with_name(draft.name + ".old")
    try:
        if output.exists():
            output.rename(old)
        draft.rename(output)
    except BaseException:
        if old.exists() and not output.exists():
            old.rename(output)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _failed_write(error: Exception, output: Path, draft: Path | None) -> OutputError | None:
    """Return the error to tell if `error` is about a file in the draft, else None."""
    # A layer below says that its file in the draft failed; the user knows of the output alone.
    cause = error.__context__ if isinstance(error, OutputError) else error
    if not isinstance(cause, (OSError, RuntimeError)):
        return None
    # Libraries in C++, and shutil, report a full disk in words of their own.
    number = getattr(cause, "errno", None)
    if number is None and draft is not None and shutil.disk_usage(draft).free < _FULL_DISK:
        number = errno.ENOSPC
    if number is not None:
        return output_error(output, OSError(number, str(cause)))
    return output_error(output, cause) if isinstance(cause, OSError) else None


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
