"""Make a Core ML delegate blob depend on its content alone.

coremltools and ExecuTorch put random identifiers, the date and build paths into the package.
Here they are replaced by hashes or removed, and files and protobuf maps are put in order, so
that two exports of the same input are the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from typing import Any

from coremltools.proto import Model_pb2

from llm_coreml.reference.inmemoryfs import pack, unpack

_ROOT = "lowered_module/"
_MODEL = "model.mlpackage/Data/com.apple.CoreML/model.mlmodel"
_MANIFEST = "model.mlpackage/Manifest.json"
# Maps of torch source lines and debug handles: they hold paths of the build machine.
_DROPPED = ("debug_info.json", "executorch_debug_handle_mapping.json")
_VOLATILE_METADATA = "com.github.apple.coremltools.conversion_date"


def canonical(blob: bytes) -> bytes:
    """Return the delegate `blob` with content-derived identifiers and in a fixed order."""
    files: dict[str, bytes | memoryview] = {
        path: data for path, data in unpack(blob).items() if not path.endswith(_DROPPED)
    }
    model = next(path for path in files if path.endswith(_MODEL))
    files[model] = _canonical_model(bytes(files[model]))
    digest = hashlib.sha256()
    for path in sorted(files):
        if path.endswith((".mlmodel", ".bin")):
            digest.update(files[path])
    for path in files:
        if path.endswith(_MANIFEST):
            files[path] = _canonical_manifest(json.loads(bytes(files[path])))
        elif path.endswith("metadata.json"):
            metadata = json.loads(bytes(files[path]))
            metadata["identifier"] = f"executorch_{_uuid(digest.hexdigest())}"
            files[path] = _json(metadata)
    return pack(files)


def _canonical_model(data: bytes) -> bytes:
    model = Model_pb2.Model.FromString(data)
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
