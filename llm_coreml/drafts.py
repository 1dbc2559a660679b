"""Places for what is not finished yet, and what becomes of them when a process is killed.

    with draft_folder(Path("exports")) as folder:
        ...

A draft is locked while its process lives and removed when the block ends. One that is not locked
was left by a process that had no time to: whoever makes the next draft beside it removes it first.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

_PREFIX = ".llm-coreml-"
# What ends a process that has something to clean up.
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def draft_folder(
    parent: Path, prefix: str = _PREFIX, rescue: Callable[[Path], None] = lambda _: None
) -> Iterator[Path]:
    """Give an empty folder in `parent` that is gone when the block ends.

    Args:
        parent: A folder.
        prefix: How the names of such folders begin.
        rescue: Takes what must not be lost out of the folder of a killed process.

    Raises:
        OSError: it cannot be made.
    """
    remove_dead(parent, prefix, rescue)
    folder: Path | None = None
    lock: int | None = None
    try:
        with uninterrupted():
            folder, lock = _make(parent, prefix, lambda path: path.mkdir(mode=0o700))
        yield folder
    finally:
        with uninterrupted():
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)
            if lock is not None:
                os.close(lock)


@contextlib.contextmanager
def draft_file(parent: Path) -> Iterator[Path]:
    """Give an empty file in `parent`; when the block ends it is gone, or has been renamed.

    Raises:
        OSError: it cannot be made.
    """
    path: Path | None = None
    lock: int | None = None
    try:
        with uninterrupted():
            path, lock = _make(parent, _PREFIX, lambda path: path.touch(exist_ok=False))
        yield path
    finally:
        with uninterrupted():
            if path is not None:
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)
            if lock is not None:
                os.close(lock)


def remove_dead(
    parent: Path, prefix: str = _PREFIX, rescue: Callable[[Path], None] = lambda _: None
) -> None:
    """Remove drafts in `parent` whose process is gone; what cannot be removed stays.

    Args:
        parent: A folder.
        prefix: How their names begin.
        rescue: Is given each before, and takes out what must not be lost.
    """
    with contextlib.suppress(OSError), os.scandir(parent) as entries:
        for entry in list(entries):
            if entry.name.startswith(prefix):
                with contextlib.suppress(OSError):
                    _remove(parent / entry.name, rescue)


def _remove(path: Path, rescue: Callable[[Path], None]) -> None:
    """Remove a draft that nobody locks."""
    if path.lstat().st_uid != os.geteuid():
        return
    lock = _lock(path)
    if lock is None:
        return
    try:
        if path.is_dir():
            rescue(path)
            shutil.rmtree(path)
        else:
            path.unlink()
    finally:
        os.close(lock)


def _make(parent: Path, prefix: str, make: Callable[[Path], object]) -> tuple[Path, int | None]:
    """Make a draft, and lock it where the file system has locks."""
    while True:
        path = parent / f"{prefix}{secrets.token_hex(6)}"
        make(path)
        try:
            lock = _lock(path)
        except FileNotFoundError:
            continue  # taken for a dead one, in the moment before it was locked
        except OSError:
            return path, None
        if lock is not None:
            return path, lock


def _lock(path: Path) -> int | None:
    """Return a descriptor that holds the lock of a file or folder, or None if another has it.

    Raises:
        OSError: it is gone, no file or folder, or the file system has no locks.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(descriptor), path.lstat()):
            raise FileNotFoundError(path)
    except BaseException as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            return None
        raise
    return descriptor


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold back what would end the process in the middle of the block, until it has ended.

    Threads other than the main one are never interrupted, so that it does nothing there.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[int] = []
    handlers = {number: signal.getsignal(number) for number in ENDING}
    try:
        for number, handler in handlers.items():
            if handler not in (None, signal.SIG_IGN):
                signal.signal(number, lambda number, _: held.append(number))
        yield
    finally:
        for number, handler in handlers.items():
            if handler not in (None, signal.SIG_IGN):
                signal.signal(number, handler)
        if held:
            signal.raise_signal(held[0])
