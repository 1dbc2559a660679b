"""From a delegate or a folder to the Core ML model in it.

    container = pte.read("model.pte")
    lowered = Packages(container).open(container.methods["forward"].delegates[0])
    lowered.package.model.functions[lowered.function]

A delegate either holds its model, or names one that lies once in the file and that several methods
use, each through a function of its own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llm_coreml.artifact import pte
from llm_coreml.artifact.inmemoryfs import unpack
from llm_coreml.artifact.limits import MAX_JSON
from llm_coreml.artifact.mapped import map_folder
from llm_coreml.artifact.method_plan import Delegate
from llm_coreml.artifact.mil import Model
from llm_coreml.artifact.milproto import parse
from llm_coreml.errors import ArtifactError, nearest

BACKEND = "CoreMLBackend"
# What a delegate's folder holds, one of the two.
MODEL, COMPILED_MODEL = "model.mlpackage", "model.mlmodelc"
# What a delegate's data begins with that lies elsewhere in the file.
REFERENCE_MARK = b"CMJR"
_COMPILED = "holds a model compiled for a device; export it uncompiled to run it here."


@dataclass(frozen=True, eq=False)
class Folder:
    """The folder that a delegate's data holds.

    Attributes:
        files: relative path to content.
        metadata: what `metadata.json` says.
    """

    files: dict[str, memoryview]
    metadata: dict[str, Any] = field(repr=False)

    @property
    def compiled(self) -> bool:
        """Whether its model is compiled for a device, which nothing here can read."""
        return any(path.startswith(f"{COMPILED_MODEL}/") for path in self.files)


@dataclass(frozen=True, eq=False)
class Use:
    """How a delegate uses a folder.

    Attributes:
        folder: the folder, which other delegates may share.
        function: the function that it asks for; "" is the model's default one.
        inputs: names of its inputs, in the order of the delegate's arguments.
        outputs: names of its outputs, in the order of the arguments that follow.
    """

    folder: Folder
    function: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Package:
    """A folder with its model.

    Attributes:
        files: relative path to content.
        model: its parsed model.
    """

    files: dict[str, memoryview]
    model: Model


@dataclass(frozen=True, eq=False)
class Lowered:
    """What a Core ML delegate runs.

    Attributes:
        package: the folder with its model, which other delegates may share.
        function: the function of the model.
        inputs: names of its inputs, in the order of the delegate's arguments.
        outputs: names of its outputs, in the order of the arguments that follow.
    """

    package: Package
    function: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


class Packages:
    """The Core ML models of one container; a model that several delegates use is parsed once."""

    def __init__(self, container: pte.Container) -> None:
        self._named = container.named_data
        # Delegates that share data share the very view; it is kept, so that its id stays its own.
        self._folders: dict[int, tuple[memoryview, Folder]] = {}
        self._parsed: dict[int, Package] = {}

    def find(self, delegate: Delegate) -> Use:
        """Return the folder that `delegate` uses, whose model may be compiled.

        Raises:
            ArtifactError: it is another backend's, or its data cannot be read.
        """
        folder, function = self._folder(delegate)
        return _use(delegate, folder, function)

    def open(self, delegate: Delegate) -> Lowered:
        """Return what `delegate` runs.

        Raises:
            ArtifactError: it is another backend's, or its data cannot be run.
        """
        folder, function = self._folder(delegate)
        if folder.compiled:
            raise ArtifactError(f"{_where(delegate)} {_COMPILED}")
        if id(folder) not in self._parsed:
            self._parsed[id(folder)] = Package(folder.files, parse(folder.files, MODEL))
        package = self._parsed[id(folder)]
        use = _use(delegate, folder, function)
        function = use.function or package.model.default_function
        if function not in package.model.functions or function not in package.model.interfaces:
            raise ArtifactError(
                f"{_where(delegate)} runs the function '{function}', which its model does not have "
                f"or does not describe.{nearest(function, package.model.functions)}"
            )
        return Lowered(package, function, use.inputs, use.outputs)

    def _folder(self, delegate: Delegate) -> tuple[Folder, str]:
        """Return the folder of a delegate, and the function that it asks for."""
        where = _where(delegate)
        if delegate.backend != BACKEND:
            raise ArtifactError(f"{where} is lowered for {delegate.backend}, not for Core ML.")
        data, function = delegate.data, ""
        if bytes(data[:4]) == REFERENCE_MARK:
            data, function = self._referred(data, where)
        if id(data) not in self._folders:
            self._folders[id(data)] = data, _folder(data, where)
        return self._folders[id(data)][1], function

    def _referred(self, data: memoryview, where: str) -> tuple[memoryview, str]:
        """Return the shared data that a reference names, and the function that it chooses."""
        try:
            decoded = json.loads(bytes(data[4 : 4 + MAX_JSON]))
            key, function = decoded["key"], decoded.get("functionName", "")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ArtifactError(
                f"{where} refers to a shared model in an unreadable way "
                f"({type(error).__name__}: {error})."
            ) from error
        if not isinstance(key, str) or not isinstance(function, str):
            raise ArtifactError(f"{where} refers to a shared model by what is no name.")
        if key not in self._named:
            raise ArtifactError(
                f"{where} refers to the model '{key}', which the file does not hold; a model in a "
                f".ptd file beside it is not supported.{nearest(key, self._named)}"
            )
        return self._named[key], function


def model_of_folder(path: Path) -> Model:
    """Return the model of a `.mlpackage` folder.

    Raises:
        ArtifactError: it is none, or compiled for a device, or damaged.
    """
    if (path / "coremldata.bin").exists() or path.suffix == ".mlmodelc":
        raise ArtifactError(f"'{path}' {_COMPILED}")
    if not (path / "Manifest.json").is_file():
        raise ArtifactError(f"'{path}' is no .mlpackage: it has no file 'Manifest.json'.")
    return parse(map_folder(path), "")


def _where(delegate: Delegate) -> str:
    return f"Delegate {delegate.index} of method '{delegate.method}'"


def _use(delegate: Delegate, folder: Folder, function: str) -> Use:
    where, names = _where(delegate), folder.metadata
    if "methods" in names:
        names = _entry(names["methods"], delegate.method, where)
        if not function:
            raise ArtifactError(f"{where} does not say which function of its model it runs.")
    else:
        # As on a device, a model for a single method is run by its default function.
        function = ""
    inputs, outputs = (_names(names, key, where) for key in ("inputNames", "outputNames"))
    return Use(folder, function, inputs, outputs)


def _folder(data: memoryview, where: str) -> Folder:
    files = unpack(data)
    try:
        metadata = json.loads(bytes(files["metadata.json"][:MAX_JSON]))
    except (ValueError, KeyError, RecursionError) as error:
        raise ArtifactError(
            f"{where} has no readable metadata.json ({type(error).__name__}: {error})."
        ) from error
    if not isinstance(metadata, dict):
        raise ArtifactError(f"{where} has a metadata.json that is no object.")
    return Folder(files, metadata)


def _entry(methods: Any, name: str, where: str) -> dict[str, Any]:
    found = methods.get(name) if isinstance(methods, dict) else None
    if not isinstance(found, dict):
        raise ArtifactError(f"{where} has a metadata.json without the method '{name}'.")
    return found


def _names(metadata: Mapping[str, Any], key: str, where: str) -> tuple[str, ...]:
    listed = metadata.get(key)
    if not isinstance(listed, list) or not all(isinstance(name, str) for name in listed):
        raise ArtifactError(f"{where} has a metadata.json without the list of names '{key}'.")
    return tuple(listed)
