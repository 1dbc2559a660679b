"""Make a Core ML delegate blob depend on its content alone.

coremltools and ExecuTorch put random identifiers, the date and build paths into the package.
Here they are replaced by hashes or removed, and files and protobuf maps are put in order, so
that two exports of the same input are the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from pathlib import Path
from typing import Any, BinaryIO

from llm_coreml.artifact.inmemoryfs import pieces
from llm_coreml.artifact.mapped import map_folder

_PACKAGE = "model.mlpackage"
_MODEL = f"{_PACKAGE}/Data/com.apple.CoreML/model.mlmodel"
_MANIFEST = f"{_PACKAGE}/Manifest.json"
# A map of torch source lines and debug handles: it holds paths of the build machine.
_DROPPED = ("executorch_debug_handle_mapping.json",)
_VOLATILE_METADATA = "com.github.apple.coremltools.conversion_date"


def write_blob(package: Path, model: Any, names: dict[str, Any], file: BinaryIO) -> str:
    """Write the delegate blob of a Core ML package.

    Args:
        package: The `.mlpackage`.
        model: Its model, of which the package holds an earlier form; it is edited.
        names: What `metadata.json` says of inputs and outputs.
        file: Where to write.

    Returns:
        What it is identified by on a device.
    """
    files: dict[str, bytes | memoryview] = {
        f"{_PACKAGE}/{path}": data
        for path, data in map_folder(package).items()
        if path not in _DROPPED
    }
    files[_MODEL] = _canonical_model(model)
    files[_MANIFEST] = _canonical_manifest(json.loads(bytes(files[_MANIFEST])))
    digest = hashlib.sha256()
    for path in sorted(files):
        if path.endswith((".mlmodel", ".bin")):
            digest.update(files[path])
    identifier = f"executorch_{_uuid(digest.hexdigest())}"
    files["metadata.json"] = _json({**names, "identifier": identifier})
    file.writelines(pieces(files))
    return identifier


def _canonical_model(model: Any) -> bytes:
    model.description.metadata.userDefined.pop(_VOLATILE_METADATA, None)
    serialized: bytes = model.SerializeToString(deterministic=True)
    return serialized


def _canonical_manifest(manifest: dict[str, Any]) -> bytes:
    """Rename the entries, whose keys are random, after the paths that they name."""
    entries = manifest["itemInfoEntries"]
    names = {key: _uuid(entry["path"]).upper() for key, entry in entries.items()}
    manifest["itemInfoEntries"] = {names[key]: entry for key, entry in entries.items()}
    manifest["rootModelIdentifier"] = names[manifest["rootModelIdentifier"]]
    return _json(manifest)


def _uuid(text: str) -> str:
    return str(uuid.uuid5(uuid.NAMESPACE_URL, text))


def _json(value: dict[str, Any]) -> bytes:
    return json.dumps(value, indent=2, sort_keys=True).encode()
