"""The folder that an export writes: program, manifest, tokenizer, model card.

An export writes into the hidden folder that `new_bundle(Path("out"), overwrite=False)` gives. It is
renamed to `out` when the block ends well, and removed when it does not. Everybody else reads:

    open_bundle(Path("out")).manifest.verification
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import jsonschema

from llm_coreml.bundle.manifest import READ_VERSIONS, Manifest, manifest_schema
from llm_coreml.checkpoint.checkpoint import TOKENIZER_FILES
from llm_coreml.errors import ArtifactError, OutputError
from llm_coreml.output import folder_beside

PROGRAM = "model.pte"
MANIFEST = "manifest.json"
RESULTS = "results.json"
CARD = "README.md"
TOKENIZER = "tokenizer.json"


@dataclass(frozen=True)
class Bundle:
    """An export on disk.

    Attributes:
        folder: Where it is.
        manifest: What its `manifest.json` says.
    """

    folder: Path
    manifest: Manifest = field(repr=False)

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


def open_bundle(folder: Path) -> Bundle:
    """Read a bundle's manifest and check that its program is there.

    Args:
        folder: The bundle, or the program in it.

    Raises:
        ArtifactError: no such folder, no program, or a manifest that is damaged or of a version
            that this release does not read.
    """
    if folder.is_file() and folder.name == PROGRAM:
        folder = folder.parent
    if not folder.is_dir():
        raise ArtifactError(
            f"'{folder}' is no bundle; give the folder that an export wrote or its {PROGRAM}."
        )
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
    except FileNotFoundError:
        raise ArtifactError(
            f"'{folder}' holds no {MANIFEST}; give the folder that an export wrote."
        ) from None
    except (OSError, ValueError) as error:
        raise ArtifactError(
            f"'{folder / MANIFEST}' cannot be read: {error}. Export again."
        ) from None
    version = manifest.get("version") if isinstance(manifest, dict) else None
    if version not in READ_VERSIONS:
        raise ArtifactError(
            f"'{folder / MANIFEST}' has version {version!r}; this release reads "
            f"versions {' and '.join(map(str, READ_VERSIONS))}. Export again, or use the release "
            "that wrote it."
        )
    try:
        jsonschema.validate(manifest, manifest_schema())
    except jsonschema.ValidationError as error:
        raise ArtifactError(
            f"'{folder / MANIFEST}' is damaged at {error.json_path}: {error.message}. Export again."
        ) from None
    if not (folder / PROGRAM).is_file():
        raise ArtifactError(f"'{folder}' holds no {PROGRAM}; export again.")
    return Bundle(folder, Manifest.from_json(manifest))


def program_at(path: Path) -> Path:
    """Return the program in the bundle at `path`, or `path` if it is no bundle's folder."""
    return path / PROGRAM if (path / PROGRAM).is_file() else path


def check_program(bundle: Bundle) -> None:
    """Hold the program against the hash in the manifest.

    Raises:
        ArtifactError: it is another file.
    """
    expected = bundle.manifest.program.sha256
    found = file_sha256(bundle.program)
    if found != expected:
        raise ArtifactError(
            f"'{bundle.program}' is not the file that its manifest describes: its SHA-256 begins "
            f"with {found[:12]}, not {expected[:12]}. Export again."
        )


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, read a piece at a time."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


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
