"""The folder that an export writes: program, manifest, tokenizer, model card.

An export writes into the hidden folder that `new_bundle(Path("out"), overwrite=False)` gives. It is
renamed to `out` when the block ends well, and removed when it does not. Everybody else reads:

    open_bundle(Path("out")).manifest.verification

What is opened is what was written, byte by byte, unless the caller does not ask for that.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from llm_coreml.bundle.manifest import Manifest
from llm_coreml.bundle.manifest_file import read_manifest
from llm_coreml.bundle.seal import check_seal
from llm_coreml.checkpoint.checkpoint import TOKENIZER_FILES
from llm_coreml.errors import ArtifactError, OutputError
from llm_coreml.output import folder_beside

PROGRAM = "model.pte"
MANIFEST = "manifest.json"
RESULTS = "results.json"
CARD = "README.md"
TOKENIZER = "tokenizer.json"
# People may edit the card, and an evaluation writes results.
_FREE = frozenset({CARD, RESULTS})


@dataclass(frozen=True)
class Bundle:
    """An export on disk.

    Attributes:
        folder: Where it is.
        manifest: What its `manifest.json` says.
        checked: Whether its files are those that the manifest describes.
    """

    folder: Path
    manifest: Manifest = field(repr=False)
    checked: bool = True

    def __str__(self) -> str:
        manifest = self.manifest
        return (
            f"{self.folder}: {manifest.source.name} for {manifest.target.backend}, "
            f"{manifest.quantization.linear.label}, {manifest.program.bytes:,} bytes"
        )

    @property
    def program(self) -> Path:
        """The `.pte`."""
        return self.folder / PROGRAM

    @property
    def tokenizer(self) -> Path:
        """The `tokenizer.json`; a model exported without a tokenizer has none."""
        return self.folder / TOKENIZER


def open_bundle(folder: Path, checked: bool = True) -> Bundle:
    """Read a bundle's manifest, and hold all files against it.

    Args:
        folder: The bundle, or the program in it.
        checked: Refuse what has changed since it was written; the bytes of a file are read once in
            a process for that. False takes the files as they are.

    Raises:
        ArtifactError: no such folder, no program, a manifest that is damaged or of a version
            that this release does not read, or files that it does not describe.
    """
    if folder.is_file() and folder.name == PROGRAM:
        folder = folder.parent
    if not folder.is_dir():
        raise ArtifactError(
            f"'{folder}' is no bundle; give the folder that an export wrote or its {PROGRAM}."
        )
    if not (folder / MANIFEST).exists():
        raise ArtifactError(
            f"'{folder}' holds no {MANIFEST}; give the folder that an export wrote."
        )
    manifest = read_manifest(folder / MANIFEST, checked)
    if not (folder / PROGRAM).is_file():
        raise ArtifactError(f"'{folder}' holds no {PROGRAM}; export again.")
    if checked:
        check_seal(manifest, folder, _FREE)
    return Bundle(folder, manifest, checked)


def is_bundle(path: Path) -> bool:
    """Say whether `path` is a folder with program and manifest, or the program in one."""
    folder = path.parent if path.name == PROGRAM and path.is_file() else path
    return (folder / PROGRAM).is_file() and (folder / MANIFEST).is_file()


def program_at(path: Path, checked: bool = True) -> Path:
    """Return the program in the bundle at `path`, or `path` if it is no bundle's folder.

    Raises:
        ArtifactError: as `open_bundle` says, where it is a bundle.
    """
    if checked and is_bundle(path):
        return open_bundle(path).program
    return path / PROGRAM if (path / PROGRAM).is_file() else path


def check_output(output: Path, overwrite: bool) -> None:
    """Refuse an output that exists or whose place cannot be written, before any work is done.

    Raises:
        OutputError: as said.
    """
    if output.exists():
        if not overwrite:
            raise OutputError(
                f"'{output}' exists already; give another -o, or --overwrite to replace it."
            )
        foreign = _foreign_entry(output)
        if foreign is not None:
            raise OutputError(
                f"'{output}' holds '{foreign}', which no export wrote, so --overwrite leaves the "
                "folder alone; move that file, or give another -o."
            )
    parent = output.absolute().parent
    existing = next(folder for folder in (parent, *parent.parents) if folder.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise OutputError(f"'{existing}' cannot be written to; give another -o.")


def _foreign_entry(output: Path) -> str | None:
    """Return the name of something at `output` that an export did not write, or None."""
    if not output.is_dir():
        return output.name
    known = {PROGRAM, MANIFEST, RESULTS, CARD, *TOKENIZER_FILES}
    names = sorted(entry.name for entry in output.iterdir())
    if names and not (output / PROGRAM).is_file():
        return names[0]
    return next((name for name in names if name not in known), None)


@contextlib.contextmanager
def new_bundle(output: Path, overwrite: bool) -> Iterator[Path]:
    """Give a draft folder beside `output` that becomes `output` when the block ends well.

    Raises:
        OutputError: the output exists, cannot be written, or the disk is full.
    """
    check_output(output, overwrite)
    with folder_beside(output, lambda place: check_output(place, overwrite)) as draft:
        yield draft
