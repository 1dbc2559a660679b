"""Files and folders as memory maps: nothing is read before it is looked at, nothing is followed.

files = map_folder(Path("model.mlpackage"))
"""

from __future__ import annotations

import contextlib
import mmap
import os
import stat
from pathlib import Path

from llm_coreml.errors import ArtifactError
from llm_coreml.lfs import pointer_advice

# A package has a handful of files; each one costs a descriptor.
MAX_FILES = 256


def map_file(path: Path) -> memoryview:
    """Return the bytes of the regular file at `path`, a read-only view that maps it.

    Raises:
        ArtifactError: it is absent, cannot be read, or is no regular file.
    """
    try:
        # Opening a pipe would wait for a writer.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except OSError as error:
        raise ArtifactError(f"'{path}' cannot be read: {error.strerror}.") from error
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise ArtifactError(f"'{path}' is no regular file; a model cannot be read from it.")
        if advice := pointer_advice(path):
            raise ArtifactError(advice)
        if not found.st_size:
            return memoryview(b"")
        return memoryview(mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"'{path}' cannot be read: {error}.") from error
    finally:
        os.close(descriptor)


def page_out(view: memoryview) -> None:
    """Take the file that `view` is a part of out of memory; what is looked at is read again."""
    pages = view.obj
    if isinstance(pages, mmap.mmap):
        # A system without it keeps its pages.
        with contextlib.suppress(AttributeError, OSError, ValueError):
            pages.madvise(mmap.MADV_DONTNEED)


def map_folder(path: Path) -> dict[str, memoryview]:
    """Return the files under the folder `path`: relative POSIX path to content, sorted by path.

    Raises:
        ArtifactError: a file cannot be read, something is a link, or there are too many files.
    """
    found: dict[str, memoryview] = {}
    pending = [path]
    while pending:
        folder = pending.pop()
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            raise ArtifactError(f"'{folder}' cannot be read: {error.strerror}.") from error
        for entry in entries:
            if entry.is_symlink():
                raise ArtifactError(
                    f"'{entry.path}' is a link, which may lead out of the package; "
                    "copy the package with its links resolved (cp -RL)."
                )
            if entry.is_dir():
                pending.append(Path(entry.path))
                continue
            if len(found) == MAX_FILES:
                raise ArtifactError(f"'{path}' holds more than {MAX_FILES} files; no model does.")
            found[Path(entry.path).relative_to(path).as_posix()] = map_file(Path(entry.path))
    return dict(sorted(found.items()))
