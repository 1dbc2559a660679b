"""Bytes on disk under a key, for evaluations that are interrupted, or made again.

    kept = Kept(default_folder() / "eval")
    data = kept.load(key)
    if data is None:
        kept.store(key, make())

A file begins with the hash of the rest, and is written beside its place and renamed: any number of
runs may share a folder. What is damaged is made anew, a disk that takes no more is done without,
and beyond a bound the least recently used goes.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import llm_coreml
from llm_coreml.drafts import remove_dead
from llm_coreml.output import check_name, file_beside
from llm_coreml.quantize.cache import make_key

_SUFFIX = ".kept"
_ENTRY = re.compile(r"[0-9a-f]{64}\.kept")
_HASH = 32
# Rows of a hidden state, and scores: a text of 300 thousand tokens takes some 3 GB at most.
_LARGEST = 8 * 10**9
# What figures are computed by, besides what quantized weights follow from.
_SOURCES = ("reference", "runtime")


class Kept:
    """A folder of such files.

    Args:
        folder: Made if it is not there.
        note: Told of a folder that cannot be written to.
        largest: Bytes that all entries may take.
    """

    def __init__(
        self,
        folder: Path,
        note: Callable[[str], None] = lambda _: None,
        largest: int = _LARGEST,
    ) -> None:
        check_name(folder)
        self.folder = folder
        self._largest = largest
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            writable = os.access(folder, os.W_OK | os.X_OK)
        except OSError:
            writable = False
        if not writable:
            note(
                f"The cache in '{folder}' cannot be written: an evaluation that is interrupted "
                "will begin again. Give another --cache."
            )
        self.tidy()

    def load(self, key: str) -> bytes | None:
        """Return what was stored, None if it is absent or damaged."""
        path = self._path(key)
        try:
            data = path.read_bytes()
            os.utime(path)
        except OSError:
            return None
        held = data[_HASH:]
        return held if hashlib.sha256(held).digest() == data[:_HASH] else None

    def store(self, key: str, data: bytes) -> bool:
        """Write an entry, and return whether it could be done."""
        try:
            with file_beside(self._path(key)) as draft, draft.open("wb") as file:
                file.write(hashlib.sha256(data).digest())
                file.write(data)
        except OSError:
            return False
        return True

    def remove(self, key: str) -> None:
        """Remove an entry, if it is there."""
        with contextlib.suppress(OSError):
            self._path(key).unlink(missing_ok=True)

    def tidy(self) -> None:
        """Remove drafts of runs that were killed, and what has not been used for longest."""
        with contextlib.suppress(OSError):
            remove_dead(self.folder)
            # Nobody else's files: the folder may be one that holds others, too.
            paths = (path for path in self.folder.iterdir() if _ENTRY.fullmatch(path.name))
            found = sorted(((path.stat(), path) for path in paths), key=lambda it: it[0].st_mtime)
            total = sum(stat.st_size for stat, _ in found)
            for stat, path in found:
                if total <= self._largest:
                    break
                path.unlink(missing_ok=True)
                total -= stat.st_size

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}{_SUFFIX}"


def key_of(facts: Mapping[str, str]) -> str:
    """Return the key of what follows from `facts` and from the code as it is now."""
    return make_key({**facts, "evaluator": _code()})


@functools.cache
def _code() -> str:
    """Return a hash of the sources that figures come from."""
    digest = hashlib.sha256()
    package = Path(llm_coreml.__file__).parent
    for root in (*(package / name for name in _SOURCES), Path(__file__).parent):
        for path in sorted(root.rglob("*.py")):
            digest.update(f"{path.relative_to(root).as_posix()}\n".encode() + path.read_bytes())
    return digest.hexdigest()
