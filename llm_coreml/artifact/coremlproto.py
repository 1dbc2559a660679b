"""The protobuf classes of Core ML's model format, without the rest of coremltools.

Importing `coremltools.proto` executes coremltools, which takes seconds and hundreds of megabytes
for its converters. The generated classes need none of it, so their folder is loaded as a package of
its own name. Protobuf keeps one class per message, so both may be loaded in one process.

    spec = model_class()()
    spec.ParseFromString(data)
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

_NAME = "llm_coreml.reference._generated_coremlproto"


def model_class() -> Any:
    """Return the class of the message that a model file holds."""
    if _NAME not in sys.modules:
        _load()
    return importlib.import_module(f"{_NAME}.Model_pb2").Model


def _load() -> None:
    found = importlib.util.find_spec("coremltools")
    if found is None or found.origin is None:
        raise ModuleNotFoundError("coremltools is not installed", name="coremltools")
    folder = Path(found.origin).parent / "proto"
    spec = importlib.util.spec_from_file_location(
        _NAME, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    if spec is None or spec.loader is None:
        raise ModuleNotFoundError(f"'{folder}' holds no package", name="coremltools.proto")
    package = importlib.util.module_from_spec(spec)
    sys.modules[_NAME] = package
    try:
        spec.loader.exec_module(package)
    except BaseException:
        del sys.modules[_NAME]
        raise
