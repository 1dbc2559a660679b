"""From a path or a delegate to a Core ML program that runs.

    program = load("model.pte")
    print(program.function_names)

A `.pte` may hold one Core ML delegate or several; `method` runs several together.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from llm_coreml.errors import ArtifactError
from llm_coreml.reference import pte
from llm_coreml.reference.inmemoryfs import unpack
from llm_coreml.reference.milproto import parse
from llm_coreml.reference.runtime import CoreMLProgram

BACKEND = "CoreMLBackend"
_REFERENCE_MARK = b"CMJR"


def load(path: str | Path, function: str | None = None) -> CoreMLProgram:
    """Load the Core ML program in a `.pte`, or in a `.mlpackage` folder.

    Args:
        path: the file or folder.
        function: which function of a multifunction model; its default one if None.

    Raises:
        ArtifactError: the file is damaged, hostile, or holds what the reference cannot run.
    """
    path = Path(path)
    if path.is_dir():
        return CoreMLProgram(parse(_read_folder(path), ""), function)
    delegates = [
        delegate for method in pte.read(path).methods.values() for delegate in method.delegates
    ]
    if not delegates:
        raise ArtifactError(f"'{path}' has no delegate: nothing in it runs on Core ML.")
    chosen = [delegate for delegate in delegates if delegate.backend == BACKEND]
    if not chosen:
        others = ", ".join(sorted({delegate.backend for delegate in delegates}))
        raise ArtifactError(f"'{path}' is lowered for {others}, not for Core ML.")
    if len(chosen) > 1:
        raise ArtifactError(
            f"'{path}' has {len(chosen)} Core ML delegates; a single program was asked for. "
            "Load the method instead."
        )
    return load_delegate(chosen[0], function)[0]


def load_delegate(
    delegate: pte.Delegate, function: str | None = None
) -> tuple[CoreMLProgram, tuple[str, ...], tuple[str, ...]]:
    """Return a delegate's program, and its input and output names in the order of the arguments.

    Raises:
        ArtifactError: it is another backend's, or its data cannot be run.
    """
    where = f"Delegate {delegate.index} of method '{delegate.method}'"
    if delegate.backend != BACKEND:
        raise ArtifactError(f"{where} is lowered for {delegate.backend}, not for Core ML.")
    if bytes(delegate.data[:4]) == _REFERENCE_MARK:
        raise ArtifactError(
            f"{where} refers to a model that several methods share; this is not supported yet."
        )
    files = unpack(delegate.data)
    if any(path.startswith("model.mlmodelc/") for path in files):
        raise ArtifactError(
            f"{where} holds a model compiled for a device; export it uncompiled to run it here."
        )
    names = _metadata(files, where)
    return (CoreMLProgram(parse(files, "model.mlpackage"), function), *names)


def _metadata(
    files: Mapping[str, memoryview], where: str
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    try:
        decoded = json.loads(bytes(files["metadata.json"]))
        names = decoded["inputNames"], decoded["outputNames"]
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{where} has no readable metadata.json ({error}).") from error
    for listed in names:
        if not isinstance(listed, list) or not all(isinstance(name, str) for name in listed):
            raise ArtifactError(f"{where} has a metadata.json without lists of names.")
    return tuple(names[0]), tuple(names[1])


def _read_folder(path: Path) -> dict[str, memoryview]:
    return {
        file.relative_to(path).as_posix(): memoryview(file.read_bytes())
        for file in sorted(path.rglob("*"))
        if file.is_file()
    }
