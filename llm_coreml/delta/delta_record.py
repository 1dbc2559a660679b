"""What `delta.json` says: of which bundle what is made, and what was found of the result.

    record = read_delta(Path("delta"))
    record.files["model.pte"].parts

It may be anybody's, so that it is held against a schema and its own numbers before it is used.
Whether the result is the right one is known by its hashes alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llm_coreml.bundle.seal import checksum, file_sha256
from llm_coreml.bundle.strict_json import parse, validator
from llm_coreml.bundle.typed_json import read_record, write_record
from llm_coreml.delta.parts import Part
from llm_coreml.errors import ArtifactError

RECORD, CHANGES = "delta.json", "changes.xz"
_VERSION = 1
# A part takes some 60 bytes, a layer some twenty parts, and no model has a thousand layers.
_LARGEST = 1 << 22
# How much more than base and changes a result may be, by factor and bytes: what is packed well is
# made of zeros, and what is copied twice was there twice.
_FACTOR, _BESIDE = 16, 1 << 24
_SIZE = {"type": "integer", "minimum": 0}
_HASH = {"type": "string", "pattern": "^[0-9a-f]{64}$"}
_FRACTION = {"type": ["number", "null"], "minimum": 0}


def _object(**fields: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": fields,
        "required": list(fields),
        "additionalProperties": False,
    }


_FILE = _object(
    bytes=_SIZE,
    sha256=_HASH,
    parts={
        "type": "array",
        "items": _object(how={"enum": ["copy", "change", "new"]}, bytes=_SIZE, start=_SIZE),
    },
)
_SCHEMA = _object(
    version={"const": _VERSION},
    base=_HASH,
    base_name={"type": "string"},
    files={
        "type": "object",
        "propertyNames": {"pattern": "^[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}$"},
        "additionalProperties": _FILE,
        "maxProperties": 64,
    },
    changes=_object(bytes=_SIZE, sha256=_HASH),
    measured={
        "anyOf": [
            {"type": "null"},
            _object(
                text={"type": "string"},
                tokens=_SIZE,
                reference={"type": "string"},
                mean_kl=_FRACTION,
                top1_agreement=_FRACTION,
                base_mean_kl=_FRACTION,
            ),
        ]
    },
    checksum=_HASH,
)


@dataclass(frozen=True)
class Made:
    """A file of the result.

    Attributes:
        bytes: Its size.
        sha256: Its hash.
        parts: What it is made of; what is copied or changed is the base's file of that name.
    """

    bytes: int
    sha256: str
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Changes:
    """The file with all that the base does not have, one XZ stream for all files in their order.

    Attributes:
        bytes: Its size.
        sha256: Its hash.
    """

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Measured:
    """How base and delta together, run by the reference runtime, predict a text.

    Attributes:
        text: Which one.
        tokens: How many tokens were scored.
        reference: What it is compared with.
        mean_kl: Mean KL(reference || base and delta), in nats per token.
        top1_agreement: Share of tokens with the same most likely one.
        base_mean_kl: The divergence of the base alone; None where it knows other tokens.
    """

    text: str
    tokens: int
    reference: str
    mean_kl: float | None
    top1_agreement: float | None
    base_mean_kl: float | None


@dataclass(frozen=True)
class DeltaRecord:
    """A delta.

    Attributes:
        version: Of the form.
        base: SHA-256 of the program that it belongs to.
        base_name: What that was exported from.
        files: The files of the result, by name.
        changes: What the base does not have.
        measured: What was found of the result; None where its program gives no logits to compare.
        checksum: SHA-256 of all else here.
    """

    version: int
    base: str
    base_name: str
    files: Mapping[str, Made]
    changes: Changes
    measured: Measured | None
    checksum: str = ""

    @property
    def result_bytes(self) -> int:
        """Bytes of all files that are made."""
        return sum(file.bytes for file in self.files.values())

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return write_record(self)


def sealed_record(record: DeltaRecord) -> DeltaRecord:
    """Return the same with its checksum."""
    return replace(record, checksum=checksum(record.to_json()))


def new_record(
    base: str, name: str, files: Mapping[str, Made], changes: Path, measured: Measured | None
) -> DeltaRecord:
    """Return the record of a delta whose changes are written; see `DeltaRecord`."""
    kept = Changes(changes.stat().st_size, file_sha256(changes))
    return sealed_record(DeltaRecord(_VERSION, base, name, files, kept, measured))


def read_delta(folder: Path) -> DeltaRecord:
    """Return what the delta in `folder` says, once its files are those that were written.

    Raises:
        ArtifactError: it is no delta, or damaged.
    """
    path = folder / RECORD
    if not path.is_file():
        raise ArtifactError(f"'{folder}' holds no {RECORD}; give a folder that `delta` wrote.")
    recorded = _parsed(path)
    error = next(validator(_SCHEMA).iter_errors(recorded), None)
    if error is not None:
        told = error.message if len(error.message) <= 160 else f"it breaks '{error.validator}'"
        raise _damaged(path, f"{error.json_path[:160]}: {told}")
    if recorded["checksum"] != checksum(recorded):
        raise _damaged(path, "its checksum is another's")
    record = read_record(DeltaRecord, recorded)
    for name, file in record.files.items():
        if sum(part.bytes for part in file.parts) != file.bytes:
            raise _damaged(path, f"the parts of '{name}' do not add up to its {file.bytes} bytes")
    _check_changes(folder / CHANGES, record.changes)
    return record


def check_result_size(record: DeltaRecord, base_bytes: int) -> None:
    """Refuse what would fill a disk for nothing.

    Raises:
        ArtifactError: as said.
    """
    most = _FACTOR * (base_bytes + record.changes.bytes) + _BESIDE
    if record.result_bytes > most:
        raise ArtifactError(
            f"The delta says that it makes {record.result_bytes:,} bytes of {base_bytes:,} and "
            f"{record.changes.bytes:,}; no export does. Make it again."
        )


def _parsed(path: Path) -> Any:
    try:
        if path.stat().st_size > _LARGEST:
            raise _damaged(path, f"it has more than {_LARGEST:,} bytes")
        return parse(path.read_bytes())
    except OSError as error:
        raise ArtifactError(f"'{path}' cannot be read: {error.strerror}.") from None
    except ValueError as error:
        raise _damaged(path, str(error)) from None


def _damaged(path: Path, why: str) -> ArtifactError:
    return ArtifactError(f"'{path}' is damaged: {why}. Copy or make the delta again.")


def _check_changes(path: Path, changes: Changes) -> None:
    if not path.is_file():
        raise ArtifactError(f"'{path}' is missing; copy or make the delta again.")
    size = path.stat().st_size
    if size != changes.bytes:
        raise _damaged(path, f"it has {size:,} bytes, not {changes.bytes:,}")
    if file_sha256(path) != changes.sha256:
        raise _damaged(path, "its SHA-256 is another's")
