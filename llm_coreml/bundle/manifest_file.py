"""Reads `manifest.json`: strict JSON, then its version, its schema, its settings, its checksum.

    manifest = read_manifest(folder / "manifest.json", checked=True)

Whoever gets a `Manifest` from here finds every field of its type and in its range.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llm_coreml.bundle.manifest import CHECKSUM, READ_VERSIONS, Manifest, manifest_schema
from llm_coreml.bundle.seal import REMEDY, checksum
from llm_coreml.bundle.strict_json import parse, validator
from llm_coreml.config import ExportConfig
from llm_coreml.config.setting import brief
from llm_coreml.errors import ArtifactError, ConfigError, UnsupportedError
from llm_coreml.lfs import pointer_advice

# A matrix takes some 400 bytes, and a layer a dozen of them; no model has a thousand layers.
_LARGEST = 1 << 22
_LONGEST = 160


def read_manifest(path: Path, checked: bool) -> Manifest:
    """Return the manifest at `path`.

    Args:
        path: The file.
        checked: Whether it must be what was written, by its checksum.

    Raises:
        ArtifactError: it cannot be read, is damaged or changed, or of a version that this release
            does not read.
    """
    if advice := pointer_advice(path):
        raise ArtifactError(advice)
    recorded = _parsed(path)
    version = recorded.get("version") if isinstance(recorded, dict) else None
    # True is 1 to Python.
    if type(version) is not int or version not in READ_VERSIONS:
        *earlier, newest = map(str, READ_VERSIONS)
        raise ArtifactError(
            f"'{path}' has version {brief(version)}; this release reads versions "
            f"{', '.join(earlier)} and {newest}. Export again, or use the release that wrote it."
        )
    wrong = _complaint(recorded)
    if wrong is not None:
        raise ArtifactError(f"'{path}' is damaged at {wrong}. Export again.")
    if checked and recorded.get(CHECKSUM) not in (None, checksum(recorded)):
        raise ArtifactError(
            f"'{path}' has been changed since it was written: its checksum is another's. {REMEDY}"
        )
    wrong = _contradiction(recorded["program"]) if checked else None
    if wrong is not None:
        raise ArtifactError(f"'{path}' contradicts itself at {wrong}. {REMEDY}")
    return Manifest.from_json(recorded)


def _parsed(path: Path) -> Any:
    try:
        if not path.is_file():
            raise ArtifactError(f"'{path}' is no regular file. Export again.")
        if path.stat().st_size > _LARGEST:
            raise ArtifactError(
                f"'{path}' has {path.stat().st_size:,} bytes, and no manifest more than "
                f"{_LARGEST:,}. Export again."
            )
        return parse(path.read_bytes())
    except OSError as error:
        raise ArtifactError(
            f"'{path}' cannot be read: {error.strerror}. Make it readable, or export again."
        ) from None
    except ValueError as error:
        raise ArtifactError(f"'{path}' cannot be read: {error}. Export again.") from None


@functools.cache
def _validator() -> Any:
    return validator(manifest_schema())


def _complaint(recorded: Mapping[str, Any]) -> str | None:
    """Return the first place that is wrong, and why; None if all is well."""
    error = next(_validator().iter_errors(recorded), None)
    if error is not None:
        told = error.message
        if len(told) > _LONGEST:
            told = f"{brief(error.instance)} breaks its rule, {error.validator}"
        return f"{error.json_path[:_LONGEST]}: {told}"
    try:
        ExportConfig.from_json(recorded["config"])
    except (ConfigError, UnsupportedError) as wrong:
        return f"$.config: {str(wrong).rstrip('.')}"
    return None


def _contradiction(program: Mapping[str, Any]) -> str | None:
    """Return where the main method is told twice, and not alike; early releases tell it once."""
    if "methods" not in program:
        return None
    main = program["methods"].get(program["method"])
    if main is None:
        return f"$.program.method: there is no method {brief(program['method'])}"
    again = {
        "inputs": dict(text.partition(" ")[::2] for text in main["inputs"]),
        "output": main["output"],
        "seq_lengths": main["seq_lengths"],
    }
    wrong = next((name for name, value in again.items() if program[name] != value), None)
    return None if wrong is None else f"$.program.{wrong}: it is another than its method's"
