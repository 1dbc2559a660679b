"""What the files of a bundle were when it was written, and whether they still are.

A manifest lists every other file by size and SHA-256, and carries a checksum of itself:

    manifest = sealed(manifest, draft)
    check_seal(manifest, folder)             # raises if a byte has changed

That tells damage and edits from what an export wrote. It is no signature: who changes a file and
counts again is believed. So readers of files trust none of them, and a runtime that must trust its
program is given one in this process only if this process has written it:

    vouch_for(manifest)                      # by an export, of its program
    is_vouched_for(manifest)
"""

from __future__ import annotations

import functools
import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from llm_coreml.bundle.manifest import CHECKSUM, File, Manifest
from llm_coreml.errors import ArtifactError
from llm_coreml.lfs import pointer_advice

# What to do where files are not what was written.
REMEDY = "Export again, or open it all the same with --unchecked (in Python, checked=False)."
# A file system may give two writes within its tick one time, so that what was written just now is
# not known by its time.
_SETTLED_NS = 1_000_000_000
_PIECE = 1 << 20
# Programs that this process has written, by their SHA-256.
_OWN: set[str] = set()


def vouch_for(manifest: Manifest) -> None:
    """Remember that this process has made the program of `manifest`, and verified it."""
    _OWN.add(manifest.program.sha256)


def is_vouched_for(manifest: Manifest) -> bool:
    """Say whether this process has made the program of `manifest`; its file is not asked."""
    return manifest.program.sha256 in _OWN


def sealed(manifest: Manifest, folder: Path) -> Manifest:
    """Return `manifest` with the files beside the program in `folder`, and its checksum.

    Args:
        manifest: All else that is told.
        folder: Where the bundle is made; it holds no manifest yet.

    Raises:
        ArtifactError: a file cannot be read.
    """
    files = {
        path.name: File(path.stat().st_size, file_sha256(path))
        for path in sorted(folder.iterdir())
        if path.is_file() and path.name != manifest.program.file
    }
    listed = replace(manifest, files=files)
    return replace(listed, checksum=checksum(listed.to_json()))


def checksum(recorded: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a manifest's JSON, all but its checksum, however it is laid out."""
    content = {key: value for key, value in recorded.items() if key != CHECKSUM}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def check_seal(manifest: Manifest, folder: Path, free: frozenset[str]) -> None:
    """Hold the files of a bundle against its manifest; the manifest's own checksum is not asked.

    Args:
        manifest: What was written; of the first releases it lists the program alone.
        folder: Where the files are.
        free: Files that anybody may edit.

    Raises:
        ArtifactError: one is missing, or another than was written.
    """
    listed = {folder / name: file for name, file in manifest.listed.items() if name not in free}
    # Sizes first: they cost nothing.
    for path, file in listed.items():
        if not path.is_file():
            raise ArtifactError(f"'{path}' is missing, which its manifest lists. {REMEDY}")
        if advice := pointer_advice(path):
            raise ArtifactError(advice)
        if path.stat().st_size != file.bytes:
            found = f"it has {path.stat().st_size:,} bytes, not {file.bytes:,}"
            raise ArtifactError(f"{_another(path)}: {found}. {REMEDY}")
    for path, file in listed.items():
        digest = file_sha256(path)
        if digest != file.sha256:
            found = f"its SHA-256 begins with {digest[:12]}, not {file.sha256[:12]}"
            raise ArtifactError(f"{_another(path)}: {found}. {REMEDY}")


def _another(path: Path) -> str:
    return f"'{path}' is not the file that its manifest describes"


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, which this process reads only once while it stays as it is.

    Raises:
        ArtifactError: it cannot be read.
    """
    try:
        found = path.stat()
        changed = max(found.st_mtime_ns, found.st_ctime_ns)
        if time.time_ns() - changed < _SETTLED_NS:
            return _read_sha256(path)
        return _known_sha256(path, found.st_dev, found.st_ino, found.st_size, changed)
    except OSError as error:
        raise ArtifactError(f"'{path}' cannot be read: {error.strerror}.") from None


@functools.lru_cache(maxsize=64)
def _known_sha256(path: Path, device: int, inode: int, size: int, changed: int) -> str:
    """Return as `_read_sha256` does; the rest tells whether `path` is still the same file."""
    return _read_sha256(path)


def _read_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()
