"""The folder that an export writes: program, manifest, tokenizer, model card.

An export writes into the hidden folder that `new_bundle(Path("out"), overwrite=False)` gives. It is
renamed to `out` when the block ends well, and removed when it does not. Everybody else reads:

    open_bundle(Path("out")).manifest.verification

What is opened is what was written, byte by byte, unless the caller does not ask for that.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from llm_coreml.bundle.manifest import Manifest
from llm_coreml.bundle.manifest_file import read_manifest
from llm_coreml.bundle.seal import check_seal, file_sha256, is_vouched_for
from llm_coreml.drafts import remove_dead
from llm_coreml.errors import ArtifactError, OutputError
from llm_coreml.output import check_name, folder_beside, output_error
from llm_coreml.plain_table import PlainTable
from llm_coreml.printable import printable

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
        return str(self._table())

    def _repr_html_(self) -> str:
        return self._table().html()

    def _table(self) -> PlainTable:
        """Return what a person wants to know of it at first."""
        manifest = self.manifest
        stored, verified = manifest.quantization, manifest.verification
        target = manifest.target
        rows = {
            "program": f"{PROGRAM}, {manifest.program.bytes:,} bytes",
            "weights": f"{stored.linear.label}; {stored.bits_per_weight:.2f} bits per weight",
            "runs on": f"{target.backend}, {target.compute_unit}, {target.minimum_os} or later",
            "context": f"{manifest.program.context:,} positions",
            "verified": f"largest error {verified.max_relative_error:.1e} of the largest logit, "
            f"mean KL {verified.mean_kl:.1e} nats ({verified.runtime})",
        }
        return PlainTable(f"{self.folder}: {manifest.source.name}", ("", ""), tuple(rows.items()))

    @property
    def own(self) -> bool:
        """Whether this very process has made the program, which has not changed since."""
        return self.checked and is_vouched_for(self.manifest)

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
    with _readable(folder):
        return _open_bundle(folder, checked)


def _open_bundle(folder: Path, checked: bool) -> Bundle:
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


def may_be_bundle(path: Path) -> bool:
    """Say whether `path` is a folder, or the program in a bundle.

    Raises:
        ArtifactError: nobody may look, or no file can have such a name.
    """
    with _readable(path):
        return path.is_dir() or is_bundle(path)


def is_bundle(path: Path) -> bool:
    """Say whether `path` is a folder with program and manifest, or the program in one."""
    folder = path.parent if path.name == PROGRAM and path.is_file() else path
    return (folder / PROGRAM).is_file() and (folder / MANIFEST).is_file()


def program_at(path: Path, checked: bool = True) -> Path:
    """Return the program in the bundle at `path`, or `path` if it is no bundle's folder.

    Raises:
        ArtifactError: as `open_bundle` says, where it is a bundle.
    """
    with _readable(path):
        if checked and is_bundle(path):
            return _open_bundle(path, checked).program
        return path / PROGRAM if (path / PROGRAM).is_file() else path


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Make an error of ours of what the system says of a path."""
    if "\0" in str(path):  # which Python asks the system about in some calls alone
        raise ArtifactError(f"'{path}' is no name of a file: no name holds a NUL.")
    try:
        yield
    except OSError as error:
        raise ArtifactError(
            f"'{path}' cannot be read: {error.strerror or error}. Give the folder that an export "
            "wrote, and make it readable."
        ) from None


def check_output(output: Path, overwrite: bool) -> None:
    """Refuse an output that exists or whose place cannot be written, before any work is done.

    Raises:
        OutputError: as said.
    """
    check_name(output)
    try:
        _check_output(output, overwrite)
    except OSError as error:
        raise output_error(output, error) from None


def _check_output(output: Path, overwrite: bool) -> None:
    if os.path.lexists(output):
        if not overwrite:
            raise OutputError(
                f"'{output}' exists already; give another -o, or --overwrite to replace it."
            )
        if os.path.samefile(output, os.curdir):
            raise OutputError(f"'{output}' is the folder that this runs in; give another -o.")
        foreign = _foreign_entries(output)
        if foreign:
            more = f" and {len(foreign) - 3:,} more" if foreign[3:] else ""
            told = ", ".join(f"'{printable(name, 60)}'" for name in foreign[:3])
            raise OutputError(
                f"'{output}' holds {told}{more}, which no export wrote, so --overwrite leaves the "
                "folder alone; move them away, or give another -o."
            )
    # A name that is too long, or below a folder that nobody may look into, is told by the system.
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        output.stat()
    parent = output.absolute().parent
    existing = next(folder for folder in (parent, *parent.parents) if folder.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise OutputError(f"'{existing}' cannot be written to; give another -o.")


def _foreign_entries(output: Path) -> list[str]:
    """Return the names of what is at `output` and no export wrote: all that no manifest lists."""
    # Imported here: it brings torch, and a bundle is also shown.
    from llm_coreml.checkpoint.checkpoint import TOKENIZER_FILES

    if not output.is_dir():
        return [output.name]
    remove_dead(output)
    entries = sorted(output.iterdir())
    try:
        manifest = read_manifest(output / MANIFEST, checked=False)
    except ArtifactError:
        return [entry.name for entry in entries]
    ours = {MANIFEST} if _is_file(output / MANIFEST) else set()
    # Manifests of the first releases list the program alone.
    beside = () if manifest.files is not None else (CARD, *TOKENIZER_FILES)
    listed = manifest.listed
    for entry in entries:
        if not _is_file(entry):
            continue
        file = listed.get(entry.name)
        if file is not None:
            free = entry.name in _FREE
            same = free or (entry.stat().st_size, file_sha256(entry)) == (file.bytes, file.sha256)
            ours |= {entry.name} if same else set()
        elif entry.name in beside or (entry.name == RESULTS and _is_evaluation(entry)):
            ours.add(entry.name)
    return [entry.name for entry in entries if entry.name not in ours]


def _is_file(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def _is_evaluation(path: Path) -> bool:
    """Say whether an evaluation of ours wrote `path`."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(found, dict) and "program_sha256" in found


@contextlib.contextmanager
def new_bundle(output: Path, overwrite: bool) -> Iterator[Path]:
    """Give a draft folder beside `output` that becomes `output` when the block ends well.

    Raises:
        OutputError: the output exists, cannot be written, or the disk is full.
    """
    check_output(output, overwrite)
    with folder_beside(output, lambda place: check_output(place, overwrite)) as draft:
        yield draft
