"""A bundle made of another one and a delta.

    apply_delta("base", "delta", output="tuned")

The result is byte by byte the bundle that the delta was made of, or nothing.
"""

from __future__ import annotations

import hashlib
import lzma
from collections.abc import Callable, Iterator
from pathlib import Path

from llm_coreml.artifact.mapped import map_file
from llm_coreml.bundle.folder import CARD, MANIFEST, Bundle, check_output, new_bundle, open_bundle
from llm_coreml.delta.delta_record import (
    CHANGES,
    DeltaRecord,
    Made,
    check_result_size,
    read_delta,
)
from llm_coreml.delta.parts import build
from llm_coreml.errors import ArtifactError

# A reader of XZ takes as much memory as its writer chose, and ours chooses 8 MiB.
_MEMORY = 1 << 26
_READ = 1 << 16


def apply_delta(
    base: str | Path, delta: str | Path, *, output: str | Path, overwrite: bool = False
) -> Bundle:
    """Write the bundle that a delta makes of another one.

    Args:
        base: The bundle that the delta belongs to, as it was written.
        delta: The folder that `delta` wrote.
        output: Folder to make.
        overwrite: Replace an earlier export at `output`.

    Raises:
        ArtifactError: base or delta are damaged, do not belong together, or make something else
            than was told.
        OutputError: `output` exists or cannot be written; nothing is left there.
    """
    place = Path(output)
    check_output(place, overwrite)
    record, opened = read_delta(Path(delta)), open_bundle(Path(base))
    check_base(record, opened)
    with new_bundle(place, overwrite) as draft:
        write_result(opened, record, Path(delta) / CHANGES, draft)
    return open_bundle(place)


def check_base(record: DeltaRecord, base: Bundle) -> None:
    """Refuse a base that a delta was not made for.

    Raises:
        ArtifactError: as said.
    """
    found = base.manifest.program.sha256
    if found != record.base:
        raise ArtifactError(
            f"The delta belongs to a program whose SHA-256 begins with {record.base[:12]}, and "
            f"that of '{base.folder}' begins with {found[:12]}; give the export of "
            f"'{record.base_name}' that it was made of."
        )


def write_result(base: Bundle, record: DeltaRecord, changes: Path, draft: Path) -> None:
    """Write the files of a delta's result to `draft`, and hold them against what it says.

    Raises:
        ArtifactError: they are others, or no bundle.
    """
    held = sum(file.bytes for file in base.manifest.listed.values())
    check_result_size(record, held)
    with changes.open("rb") as file:
        stream = _Stream(file.read, str(changes))
        for name, made in sorted(record.files.items()):
            _write(_source(base, name, made), made, stream, draft / name)
        stream.check_end()
    if MANIFEST not in record.files:
        raise ArtifactError(f"The delta makes no {MANIFEST}; make it again.")
    listed = {MANIFEST, *open_bundle(draft).manifest.listed}
    if listed != set(record.files):
        raise ArtifactError("The delta makes other files than its manifest lists; make it again.")


def _source(base: Bundle, name: str, made: Made) -> memoryview:
    """Return the base's file that parts are taken of; empty where none is."""
    if all(part.how == "new" for part in made.parts):
        return memoryview(b"")
    # The card may be edited, and no other file is known to be what it was.
    if name == CARD or name not in base.manifest.listed:
        raise ArtifactError(f"The delta takes parts of a '{name}' that nobody vouches for.")
    return map_file(base.folder / name)


def _write(source: memoryview, made: Made, stream: _Stream, path: Path) -> None:
    furthest = max((p.start + p.bytes for p in made.parts if p.how != "new"), default=0)
    if furthest > len(source):
        raise ArtifactError(
            f"The delta takes bytes up to {furthest:,} of '{path.name}', which has "
            f"{len(source):,}; make it again."
        )
    digest = hashlib.sha256()
    with path.open("xb") as file:
        for piece in build(source, made.parts, stream.take):
            file.write(piece)
            digest.update(piece)
    if digest.hexdigest() != made.sha256:
        raise ArtifactError(
            f"Base and delta give another '{path.name}' than was told; copy or make the delta "
            "again."
        )


class _Stream:
    """The changes, as they are asked for; no more of them are unpacked than that."""

    def __init__(self, read: Callable[[int], bytes], name: str) -> None:
        self._read = read
        self._name = name
        self._packed = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_MEMORY)

    def take(self, count: int) -> bytes:
        """Return the next `count` bytes. Raises ArtifactError where there are fewer."""
        found = bytearray()
        while len(found) < count:
            found += self._next(count - len(found))
        return bytes(found)

    def check_end(self) -> None:
        """Refuse bytes that nobody asked for. Raises ArtifactError."""
        if not self._packed.eof and any(self._rest()):
            raise ArtifactError(f"'{self._name}' holds more than its parts; make it again.")
        if not self._packed.eof or self._packed.unused_data or self._read(1):
            raise ArtifactError(f"'{self._name}' does not end as it should; make it again.")

    def _rest(self) -> Iterator[bytes]:
        while not self._packed.eof:
            yield self._next(1)

    def _next(self, most: int) -> bytes:
        if self._packed.eof:
            raise ArtifactError(f"'{self._name}' holds less than its parts; make it again.")
        fresh = self._read(_READ) if self._packed.needs_input else b""
        if self._packed.needs_input and not fresh:
            raise ArtifactError(f"'{self._name}' is cut; copy or make the delta again.")
        try:
            return self._packed.decompress(fresh, most)
        except (lzma.LZMAError, MemoryError) as error:
            raise ArtifactError(f"'{self._name}' cannot be unpacked: {error}.") from None
