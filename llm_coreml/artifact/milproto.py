"""Parser of a Core ML model's protobuf messages into the types of `mil`.

The protobuf classes of coremltools are used as a message parser and nowhere else; what leaves this
module is checked against the file's own declarations.

    model = parse(unpack(delegate.data), "model.mlpackage")
    for operation in model.functions["main"].operations:
        print(operation.type, operation.name)
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from llm_coreml.artifact.coremlproto import model_class
from llm_coreml.artifact.dtypes import DTYPES, by_code
from llm_coreml.artifact.limits import (
    MAX_JSON,
    MAX_OPERATIONS,
    MAX_PROGRAM,
    MAX_RANK,
    beyond,
)
from llm_coreml.artifact.mil import (
    Binding,
    Block,
    Constant,
    Feature,
    Function,
    Interface,
    ListType,
    Model,
    NamedType,
    Operation,
    StateType,
    TensorType,
    ValueType,
    fixed_shape,
)
from llm_coreml.artifact.weight_file import WeightFile, unpack_elements
from llm_coreml.errors import ArtifactError

_BLOB_ROOT = "@model_path/"
_MAX_DEPTH = 32


def parse(files: Mapping[str, memoryview], package: str) -> Model:
    """Parse the `.mlpackage` whose files lie under `package` in `files`.

    Args:
        files: relative POSIX path to content, as `inmemoryfs.unpack` gives it.
        package: path of the package in `files`; "" if `files` is the package itself.

    Raises:
        ArtifactError: a file is absent, damaged, or the model is no ML Program.
    """
    prefix = f"{package}/" if package else ""
    manifest = _file(files, f"{prefix}Manifest.json")
    try:
        decoded = json.loads(bytes(manifest[:MAX_JSON]))
        item = decoded["itemInfoEntries"][decoded["rootModelIdentifier"]]
        model_path = PurePosixPath(f"{prefix}Data") / item["path"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ArtifactError(f"The package's Manifest.json is damaged ({error}).") from error
    spec = _decode_message(_file(files, str(model_path)))
    if spec.WhichOneof("Type") != "mlProgram":
        raise ArtifactError(
            f"The Core ML model is a {spec.WhichOneof('Type') or 'model without content'}, "
            "not an ML Program; convert it for iOS 15 or later."
        )
    reader = _Reader(files, model_path.parent)
    functions = {
        name: reader.function(name, message) for name, message in spec.mlProgram.functions.items()
    }
    return Model(
        spec.specificationVersion,
        functions,
        _interfaces(spec, functions),
        _default(spec, functions),
    )


def _decode_message(data: memoryview) -> Any:
    from google.protobuf.message import DecodeError

    if len(data) > MAX_PROGRAM:
        raise ArtifactError(
            f"The Core ML model has {len(data)} bytes without its weights; at most {MAX_PROGRAM} "
            "are read."
        )
    spec = model_class()()
    try:
        spec.ParseFromString(bytes(data))
    except DecodeError as error:
        raise ArtifactError(f"The Core ML model's protobuf is damaged ({error}).") from error
    return spec


def _file(files: Mapping[str, memoryview], path: str) -> memoryview:
    if path not in files:
        raise ArtifactError(f"The Core ML model has no file '{path}'.")
    return files[path]


def _interfaces(spec: Any, functions: Mapping[str, Function]) -> dict[str, Interface]:
    described = {item.name: item for item in spec.description.functions}
    if not described:
        described = {name: spec.description for name in functions}
    return {
        name: Interface(
            tuple(_feature(feature) for feature in item.input),
            tuple(_feature(feature) for feature in item.output),
            tuple(_feature(feature) for feature in item.state),
        )
        for name, item in described.items()
    }


def _default(spec: Any, functions: Mapping[str, Function]) -> str:
    wanted = spec.description.defaultFunctionName or "main"
    if wanted in functions:
        return str(wanted)
    if len(functions) == 1:
        return next(iter(functions))
    raise ArtifactError(
        f"The Core ML program has no function '{wanted}', only {', '.join(sorted(functions))}."
    )


# ArrayFeatureType.ArrayDataType of the model description.
_FEATURE_TYPES = {65552: "fp16", 65568: "fp32", 65600: "fp64", 131104: "int32", 131080: "int8"}


def _feature(message: Any) -> Feature:
    kind = message.type.WhichOneof("Type")
    array = message.type.stateType.arrayType if kind == "stateType" else message.type.multiArrayType
    if kind not in ("multiArrayType", "stateType"):
        raise ArtifactError(
            f"'{message.name}' is a {kind}; the reference runtime handles arrays only."
        )
    dtype = _FEATURE_TYPES.get(array.dataType)
    if dtype is None:
        raise ArtifactError(f"'{message.name}' has the unknown array type {array.dataType}.")
    ranges = tuple(
        (int(item.lowerBound), int(item.upperBound) if item.upperBound >= 0 else None)
        for item in array.shapeRange.sizeRanges
    )
    shapes = [array.shape, *(item.shape for item in array.enumeratedShapes.shapes)]
    for shape in shapes:
        if any(size < 0 for size in shape):
            raise ArtifactError(f"'{message.name}' has the impossible shape {list(shape)}.")
        if excess := beyond(math.prod(shape)):
            raise ArtifactError(f"'{message.name}' of shape {list(shape)} {excess}.")
    return Feature(
        message.name,
        dtype,
        tuple(array.shape),
        tuple(tuple(item.shape) for item in array.enumeratedShapes.shapes),
        ranges,
        bool(message.type.isOptional),
    )


class _Reader:
    """Turns protobuf messages into this module's types."""

    def __init__(self, files: Mapping[str, memoryview], folder: PurePosixPath) -> None:
        self._files = files
        self._folder = folder
        self._weights: dict[str, WeightFile] = {}
        # Bytes that the constants of the current function claim; many may name one blob.
        self._stored = 0

    def function(self, name: str, message: Any) -> Function:
        if message.opset not in message.block_specializations:
            raise ArtifactError(f"Function '{name}' lacks the block for its opset {message.opset}.")
        block = message.block_specializations[message.opset]
        if len(block.operations) > MAX_OPERATIONS:
            raise ArtifactError(
                f"Function '{name}' has {len(block.operations)} operations; at most "
                f"{MAX_OPERATIONS} are read."
            )
        self._stored = 0
        inputs = tuple(self._named(item) for item in message.inputs)
        _check_states(inputs)
        return Function(
            name,
            message.opset,
            inputs,
            tuple(block.outputs),
            tuple(self._operation(item) for item in block.operations),
        )

    def _named(self, message: Any) -> NamedType:
        return NamedType(message.name, self.type(message.type))

    def _operation(self, message: Any, depth: int = 0) -> Operation:
        attributes = {key: self.constant(value) for key, value in message.attributes.items()}
        label = attributes.pop("name", None)
        outputs = tuple(self._named(item) for item in message.outputs)
        name = label.value() if label is not None else None
        if not isinstance(name, str):
            name = outputs[0].name if outputs else message.type
        inputs = {
            key: tuple(self._binding(item, name) for item in argument.arguments)
            for key, argument in message.inputs.items()
        }
        blocks = tuple(self._block(item, depth + 1) for item in message.blocks)
        return Operation(message.type, name, inputs, attributes, outputs, blocks)

    def _block(self, message: Any, depth: int) -> Block:
        if depth > _MAX_DEPTH:
            raise ArtifactError(f"The program nests blocks deeper than {_MAX_DEPTH}.")
        return Block(
            tuple(self._named(item) for item in message.inputs),
            tuple(message.outputs),
            tuple(self._operation(item, depth) for item in message.operations),
        )

    def _binding(self, message: Any, operation: str) -> Binding:
        kind = message.WhichOneof("binding")
        if kind == "name":
            return str(message.name)
        if kind == "value":
            return self.constant(message.value)
        raise ArtifactError(f"Operation '{operation}' has an input that is bound to nothing.")

    def type(self, message: Any) -> ValueType:
        kind = message.WhichOneof("type")
        if kind == "tensorType":
            tensor = message.tensorType
            if tensor.rank != len(tensor.dimensions):
                raise ArtifactError(
                    f"A type declares rank {tensor.rank} and {len(tensor.dimensions)} dimensions."
                )
            if tensor.rank > MAX_RANK:
                raise ArtifactError(f"A type has rank {tensor.rank}; at most {MAX_RANK} is read.")
            row = by_code(tensor.dataType)
            declared = TensorType(row.name, tuple(map(_dimension, tensor.dimensions)))
            if excess := beyond(_known_elements(declared) * row.bits // 8):
                raise ArtifactError(f"A value of type {declared} {excess}.")
            return declared
        if kind == "listType":
            return ListType(_dimension(message.listType.length))
        if kind == "tupleType":
            return ListType(len(message.tupleType.types))
        if kind == "stateType":
            wrapped = self.type(message.stateType.wrappedType)
            if isinstance(wrapped, TensorType):
                return StateType(wrapped)
        raise ArtifactError(f"The program uses a value of type {kind}, which is not supported.")

    def constant(self, message: Any) -> Constant:
        declared = self.type(message.type)
        if message.WhichOneof("value") == "blobFileValue":
            if not isinstance(declared, TensorType):
                raise ArtifactError(f"A weight file cannot hold a value of type {declared}.")
            blob = message.blobFileValue
            self._stored += _known_elements(declared) * DTYPES[declared.dtype].bits // 8
            if excess := beyond(self._stored):
                raise ArtifactError(f"A function's constants: their data {excess}.")
            return Constant(declared, blob=(self._weight_file(blob.fileName), blob.offset))
        immediate = message.immediateValue
        kind = immediate.WhichOneof("value")
        if kind in ("list", "tuple"):
            items = getattr(immediate, kind).values
            return Constant(declared, tuple(_plain(self.constant(item)) for item in items))
        if kind != "tensor" or not isinstance(declared, TensorType):
            raise ArtifactError(f"A constant of type {declared} holds a {kind}.")
        return Constant(declared, _immediate(immediate.tensor, declared))

    def _weight_file(self, name: str) -> WeightFile:
        if name not in self._weights:
            if not name.startswith(_BLOB_ROOT):
                raise ArtifactError(f"A constant lies in '{name}', outside of the model.")
            path = str(self._folder / name[len(_BLOB_ROOT) :])
            self._weights[name] = WeightFile(_file(self._files, path), path.rsplit("/", 1)[-1])
        return self._weights[name]


def _known_elements(declared: TensorType) -> int:
    """Return the elements that a value of this type has at least, taking a size of 0 for 1."""
    return math.prod(size or 1 for size in declared.shape)


def _check_states(inputs: tuple[NamedType, ...]) -> None:
    # They are allocated when a program is loaded, every element in fp32.
    states = [item.type.wrapped for item in inputs if isinstance(item.type, StateType)]
    if excess := beyond(sum(4 * _known_elements(state) for state in states)):
        listed = ", ".join(map(str, states[:4]))
        raise ArtifactError(f"The program's state ({listed}) {excess}.")


def _dimension(message: Any) -> int | None:
    kind = message.WhichOneof("dimension")
    if kind == "constant":
        return int(message.constant.size)
    if message.unknown.variadic:
        raise ArtifactError("The program uses a type of unknown rank, which is not supported.")
    return None


def _plain(constant: Constant) -> Any:
    value = constant.value()
    return value.tolist() if isinstance(value, np.ndarray) else value


def _immediate(message: Any, declared: TensorType) -> np.ndarray | str:
    shape = fixed_shape(declared, "A constant")
    count = math.prod(shape)
    row = DTYPES[declared.dtype]
    kind = message.WhichOneof("value")
    values: Any = getattr(message, kind).values if kind else ()
    if kind == "bytes":
        if len(values) != -(-count * row.bits // 8) or row.name == "string":
            raise ArtifactError(f"A constant of type {declared} holds {len(values)} bytes.")
        return unpack_elements(values, row, count).reshape(shape)
    if len(values) != count:
        raise ArtifactError(f"A constant of type {declared} holds {len(values)} values.")
    if row.name == "string":
        return str(values[0]) if shape == () else np.array(list(values), object).reshape(shape)
    try:
        return np.fromiter(values, row.array, count).reshape(shape)
    except (OverflowError, ValueError) as error:
        raise ArtifactError(f"A constant of type {declared} holds other values.") from error
