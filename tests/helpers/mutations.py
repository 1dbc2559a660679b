"""Single changes to a Core ML program: what a converter, a pass or a damaged disk may do to it.

    package = Package(path)
    for mutation in draw(package, count=200, seed=0):
        with package.changed(mutation):
            runner = ReferenceRunner(path)          # sees the changed program

A mutation edits the protobuf messages and the bytes of `weight.bin`; what opens the file afterwards
is the product's own code, which is given the container with other bytes in its delegate.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from llm_coreml.artifact import pte
from llm_coreml.artifact.inmemoryfs import pack, unpack

Apply = Callable[[Any, bytearray], None]
_METADATA = struct.Struct("<IIQQQ")
_FP16, _FP32, _INT32, _INT8 = 10, 11, 23, 21


@dataclass(frozen=True)
class Mutation:
    """One change.

    Attributes:
        kind: what sort of change it is.
        what: which one, in words.
        apply: makes it, in a model message and the bytes of its weights.
    """

    kind: str
    what: str
    apply: Apply


class Package:
    """The only Core ML model of a `.pte`, and its changed versions.

    Attributes:
        path: the file.
        spec: its parsed model message; not changed.
        weights: its `weight.bin`.
    """

    def __init__(self, path: Path) -> None:
        from coremltools.proto import Model_pb2

        self.path = path
        self._container = pte.read(path)
        (self._delegate,) = self._container.methods["forward"].delegates
        self._files = unpack(self._delegate.data)
        (self._model,) = [name for name in self._files if name.endswith(".mlmodel")]
        (self._weights,) = [name for name in self._files if name.endswith("weight.bin")]
        self.spec = Model_pb2.Model.FromString(bytes(self._files[self._model]))
        self.weights = bytes(self._files[self._weights])

    @contextmanager
    def changed(self, mutation: Mutation) -> Iterator[None]:
        """While the context lasts, `pte.read` gives the file with `mutation` in it."""
        spec, weights = type(self.spec)(), bytearray(self.weights)
        spec.CopyFrom(self.spec)
        mutation.apply(spec, weights)
        changed = {self._model: spec.SerializeToString(), self._weights: bytes(weights)}
        if changed == {self._model: self.spec.SerializeToString(), self._weights: self.weights}:
            raise AssertionError(f"{mutation.what} changes nothing")
        delegate = replace(self._delegate, data=memoryview(pack({**self._files, **changed})))
        method = replace(self._container.methods["forward"], delegates=(delegate,))
        methods = {**self._container.methods, "forward": method}
        container = replace(self._container, methods=methods)
        original = pte.read
        pte.read = lambda _: container  # type: ignore[assignment]
        try:
            yield
        finally:
            pte.read = original


def draw(package: Package, count: int, seed: int) -> list[Mutation]:
    """Return `count` mutations of `package`, as many of each kind as there are, at random."""
    dice = random.Random(seed)
    by_kind: dict[str, list[Mutation]] = {}
    for mutation in mutations(package, dice):
        by_kind.setdefault(mutation.kind, []).append(mutation)
    for found in by_kind.values():
        dice.shuffle(found)
    drawn: list[Mutation] = []
    while len(drawn) < count and any(by_kind.values()):
        drawn += [found.pop() for found in by_kind.values() if found]
    return drawn[:count]


def block(spec: Any) -> Any:
    """Return the block of the model's only function."""
    (function,) = spec.mlProgram.functions.values()
    return function.block_specializations[function.opset]


def mutations(package: Package, dice: random.Random) -> Iterator[Mutation]:
    """Yield every mutation that is foreseen; where numbers are free, `dice` chooses them."""
    program = _Program(package.spec)
    yield from _stored(program, package.weights, dice)
    yield from _immediate(program, dice)
    yield from _operands(program, dice)
    yield from _operations(program)
    yield from _declared(program)
    yield from _described(package.spec)


class _Program:
    """The operations of the block, and who uses which constant for what."""

    def __init__(self, spec: Any) -> None:
        self.operations = list(block(spec).operations)
        self.types: dict[str, str] = {}
        self.order: dict[str, int] = {}
        self.uses: dict[str, list[tuple[str, str]]] = {}
        (function,) = spec.mlProgram.functions.values()
        for item in function.inputs:
            self.types[item.name], self.order[item.name] = str(item.type), -1
        for number, operation in enumerate(self.operations):
            for item in operation.outputs:
                self.types[item.name], self.order[item.name] = str(item.type), number
            for key, argument in operation.inputs.items():
                for binding in argument.arguments:
                    if binding.WhichOneof("binding") == "name":
                        self.uses.setdefault(binding.name, []).append((operation.type, key))

    def at(self, number: int) -> str:
        operation = self.operations[number]
        outputs = ", ".join(item.name for item in operation.outputs)
        return f"{operation.type} {outputs or number}"


# Stored numbers.

_STORED = {
    ("constexpr_blockwise_shift_scale", "data"): "weight byte",
    ("constexpr_blockwise_shift_scale", "scale"): "scale byte",
    ("constexpr_lut_to_dense", "indices"): "weight byte",
    ("constexpr_lut_to_dense", "lut"): "table entry",
}


def _blobs(program: _Program) -> Iterator[tuple[str, str, int]]:
    """Yield the kind, the name and the offset of every value in the weight file."""
    for number, operation in enumerate(program.operations):
        values = [("val", operation.attributes["val"])] if operation.type == "const" else []
        for key, argument in operation.inputs.items():
            values += [(key, item.value) for item in argument.arguments if item.HasField("value")]
        for key, value in values:
            if value.WhichOneof("value") == "blobFileValue":
                kind = _STORED.get((operation.type, key), "norm, RoPE or bias byte")
                yield kind, f"{program.at(number)}: {key}", value.blobFileValue.offset


def _stored(program: _Program, weights: bytes, dice: random.Random) -> Iterator[Mutation]:
    for kind, name, offset in _blobs(program):
        _, _, size, start, _ = _METADATA.unpack_from(weights, offset)
        for _ in range(4):
            at, flip = dice.randrange(size), dice.randrange(1, 256)
            yield Mutation(kind, f"{name}: byte {at} ^ {flip:#x}", _flip(start + at, flip))
    for number, operation in enumerate(program.operations):
        if operation.type == "constexpr_blockwise_shift_scale":
            yield Mutation("zero point", f"{program.at(number)}: 1", _zero_point(number))


def _flip(at: int, flip: int) -> Apply:
    def apply(spec: Any, weights: bytearray) -> None:
        weights[at] ^= flip

    return apply


def _zero_point(number: int) -> Apply:
    """Give a compressed weight an offset of one everywhere."""

    def apply(spec: Any, weights: bytearray) -> None:
        operation = block(spec).operations[number]
        data = operation.inputs["data"].arguments[0].value.type
        scale = operation.inputs["scale"].arguments[0].value.type
        value = operation.inputs["offset"].arguments.add().value
        value.type.CopyFrom(scale)
        value.type.tensorType.dataType = data.tensorType.dataType
        count = 1
        for dimension in scale.tensorType.dimensions:
            count *= dimension.constant.size
        narrow = data.tensorType.dataType != _INT8
        ones = b"\x11" * (-(-count // 2)) if narrow else b"\x01" * count
        value.immediateValue.tensor.bytes.values = ones

    return apply


# Constants in the program itself.

_AXES = {"axis", "axes"}
_BOUNDS = {"begin", "end", "stride", "shape", "split_sizes", "values", "indices", "batch_dims"}


def _immediate(program: _Program, dice: random.Random) -> Iterator[Mutation]:
    for number, operation in enumerate(program.operations):
        if operation.type != "const" or not program.uses.get(operation.outputs[0].name):
            continue
        value = operation.attributes["val"]
        if value.WhichOneof("value") != "immediateValue":
            continue
        user, key = program.uses[operation.outputs[0].name][0]
        tensor, name = value.immediateValue.tensor, f"{user}.{key} ({program.at(number)})"
        if tensor.WhichOneof("value") == "ints":
            yield from _integers(number, list(tensor.ints.values), key, name, dice)
        elif tensor.WhichOneof("value") == "bools":
            for place in range(len(tensor.bools.values)):
                yield Mutation("flag", f"{name}[{place}] flipped", _flag(number, place))
        elif value.type.tensorType.dataType in (_FP16, _FP32):
            for label, change in _CHANGES.items():
                if change(1.5) != 1.5:
                    yield Mutation("number", f"{name} {label}", _number(number, change))


def _integers(
    number: int, values: list[int], key: str, name: str, dice: random.Random
) -> Iterator[Mutation]:
    kind = "axis" if key in _AXES else "bound or size" if key in _BOUNDS else "integer"
    if key == "perm":
        first, second = dice.sample(range(len(values)), 2)
        yield Mutation("perm", f"{name}: {first} and {second}", _exchange(number, first, second))
        return
    for place in range(len(values)):
        step = dice.choice((-1, 1))
        yield Mutation(kind, f"{name}[{place}] {step:+}", _integer(number, place, step))


def _tensor(spec: Any, number: int) -> Any:
    return block(spec).operations[number].attributes["val"].immediateValue.tensor


def _integer(number: int, place: int, step: int) -> Apply:
    def apply(spec: Any, weights: bytearray) -> None:
        _tensor(spec, number).ints.values[place] += step

    return apply


def _exchange(number: int, first: int, second: int) -> Apply:
    def apply(spec: Any, weights: bytearray) -> None:
        values = _tensor(spec, number).ints.values
        values[first], values[second] = values[second], values[first]

    return apply


def _flag(number: int, place: int) -> Apply:
    def apply(spec: Any, weights: bytearray) -> None:
        values = _tensor(spec, number).bools.values
        values[place] = not values[place]

    return apply


_CHANGES: dict[str, Callable[[float], float]] = {
    "doubled": lambda x: 2 * x + 1e-3 * (x == 0),
    "negated": lambda x: -x - 1e-3 * (x == 0),
    "a hundredth": lambda x: x / 100 + 1e-3 * (x == 0),
    "one": lambda x: 1.0,
}


def _number(number: int, change: Callable[[float], float]) -> Apply:
    def apply(spec: Any, weights: bytearray) -> None:
        tensor = _tensor(spec, number)
        if tensor.WhichOneof("value") == "floats":
            tensor.floats.values[:] = [change(value) for value in tensor.floats.values]
            return
        values = np.frombuffer(tensor.bytes.values, np.float16)
        with np.errstate(over="ignore"):
            changed = np.array([change(float(value)) for value in values]).astype(np.float16)
        tensor.bytes.values = changed.tobytes()

    return apply


# What operations are bound to.

_PAIRS = (("x", "y"), ("begin", "end"), ("key", "value"), ("query", "key"), ("x", "update"))


def _operands(program: _Program, dice: random.Random) -> Iterator[Mutation]:
    for number, operation in enumerate(program.operations):
        bound = {
            key: [item.name for item in argument.arguments]
            for key, argument in operation.inputs.items()
        }
        for first, second in _PAIRS:
            if first in bound and second in bound and bound[first] != bound[second]:
                what = f"{program.at(number)}: {first} and {second}"
                yield Mutation("operands swapped", what, _swap(number, first, second))
        if operation.type == "concat" and len(set(bound["values"])) > 1:
            yield Mutation("operands swapped", f"{program.at(number)}: values", _reverse(number))
        for key, names in sorted(bound.items()):
            for place, name in enumerate(names):
                others = _alike(program, name, number)
                if others:
                    other = dice.choice(others)
                    what = f"{program.at(number)}: {key} {name} -> {other}"
                    kind = "state" if name in _STATES else "other operand"
                    yield Mutation(kind, what, _rebind(number, key, place, other))


_STATES = ("cache_keys", "cache_values")


def _alike(program: _Program, name: str, number: int) -> list[str]:
    """Return the other values of the same declared type that exist before operation `number`."""
    declared = program.types.get(name)
    return [
        other
        for other, known in program.types.items()
        if known == declared and other != name and program.order[other] < number
    ]


def _swap(number: int, first: str, second: str) -> Apply:
    def apply(spec: Any, weights: bytearray) -> None:
        inputs = block(spec).operations[number].inputs
        kept = type(inputs[first])()
        kept.CopyFrom(inputs[first])
        inputs[first].CopyFrom(inputs[second])
        inputs[second].CopyFrom(kept)

    return apply


def _reverse(number: int) -> Apply:
    def apply(spec: Any, weights: bytearray) -> None:
        arguments = block(spec).operations[number].inputs["values"].arguments
        names = [item.name for item in arguments]
        for item, name in zip(arguments, reversed(names), strict=True):
            item.name = name

    return apply


def _rebind(number: int, key: str, place: int, other: str) -> Apply:
    def apply(spec: Any, weights: bytearray) -> None:
        block(spec).operations[number].inputs[key].arguments[place].name = other

    return apply


# The operations themselves.

_SIBLINGS = {
    "add": ("sub", "mul"),
    "sub": ("add",),
    "mul": ("add", "real_div"),
    "real_div": ("mul", "floor_div"),
    "maximum": ("minimum",),
    "reduce_max": ("reduce_min", "reduce_mean"),
    "reduce_mean": ("reduce_sum", "reduce_max"),
    "rsqrt": ("inverse",),
    "abs": ("square",),
    "silu": ("relu", "sigmoid"),
    "greater": ("greater_equal", "less"),
}


def _operations(program: _Program) -> Iterator[Mutation]:
    for number, operation in enumerate(program.operations):
        at = program.at(number)
        for sibling in _SIBLINGS.get(operation.type, ()):
            yield Mutation("sibling operation", f"{at} -> {sibling}", _retype(number, sibling))
        if operation.type == "write_state":
            yield Mutation("state", f"{at} ({number}) dropped", _drop(number))
        if len(operation.outputs) == 1 and operation.type not in ("const", "read_state"):
            for key in ("x", "query"):
                if key in operation.inputs and operation.inputs[key].arguments[0].name:
                    yield Mutation("bypass", f"{at}: its {key} instead", _bypass(number, key))


def _retype(number: int, sibling: str) -> Apply:
    def apply(spec: Any, weights: bytearray) -> None:
        block(spec).operations[number].type = sibling

    return apply


def _drop(number: int) -> Apply:
    def apply(spec: Any, weights: bytearray) -> None:
        del block(spec).operations[number]

    return apply


def _bypass(number: int, key: str) -> Apply:
    """Let whoever uses the result of an operation use its operand instead."""

    def apply(spec: Any, weights: bytearray) -> None:
        operations = block(spec).operations
        (result,) = operations[number].outputs
        operand = operations[number].inputs[key].arguments[0].name
        for operation in operations[number + 1 :]:
            for argument in operation.inputs.values():
                for item in argument.arguments:
                    if item.name == result.name:
                        item.name = operand
        names = block(spec).outputs
        names[:] = [operand if name == result.name else name for name in names]

    return apply


# What is declared and described.


def _declared(program: _Program) -> Iterator[Mutation]:
    for number, operation in enumerate(program.operations):
        for place, item in enumerate(operation.outputs):
            what = f"{item.name} of {operation.type}"
            if item.type.WhichOneof("type") != "tensorType" or operation.type == "const":
                continue
            yield Mutation("declared type", f"{what}: element type", _other_type(number, place))
            for axis, size in enumerate(item.type.tensorType.dimensions):
                if size.WhichOneof("dimension") == "constant":
                    change = _other_size(number, place, axis)
                    yield Mutation("declared shape", f"{what}: axis {axis}", change)


def _other_type(number: int, place: int) -> Apply:
    def apply(spec: Any, weights: bytearray) -> None:
        tensor = block(spec).operations[number].outputs[place].type.tensorType
        tensor.dataType = _FP32 if tensor.dataType == _FP16 else _FP16

    return apply


def _other_size(number: int, place: int, axis: int) -> Apply:
    def apply(spec: Any, weights: bytearray) -> None:
        tensor = block(spec).operations[number].outputs[place].type.tensorType
        tensor.dimensions[axis].constant.size += 1

    return apply


def _described(spec: Any) -> Iterator[Mutation]:
    for part in ("input", "output", "state"):
        for number, feature in enumerate(getattr(spec.description, part)):
            array = _array(spec, part, number)
            yield Mutation("interface", f"{feature.name}: type", _other_array_type(part, number))
            for axis in range(len(array.shape)):
                change = _other_array_size(part, number, axis)
                yield Mutation("interface", f"{feature.name}: axis {axis}", change)


def _array(spec: Any, part: str, number: int) -> Any:
    kind = getattr(spec.description, part)[number].type
    return kind.stateType.arrayType if part == "state" else kind.multiArrayType


def _other_array_type(part: str, number: int) -> Apply:
    def apply(spec: Any, weights: bytearray) -> None:
        array = _array(spec, part, number)
        float16, int32 = 65552, 131104
        array.dataType = int32 if array.dataType == float16 else float16

    return apply


def _other_array_size(part: str, number: int, axis: int) -> Apply:
    def apply(spec: Any, weights: bytearray) -> None:
        array = _array(spec, part, number)
        array.shape[axis] += 1
        for item in array.enumeratedShapes.shapes:
            item.shape[axis] += 1

    return apply
