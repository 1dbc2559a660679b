"""The execution plan of one method of a `.pte`: its values, instructions and delegates.

Nothing here executes. Data that tensors start with stays a view into the file.

    method = decode(table, stored)
    for step in method.instructions:
        print(step.kind, step.target, [method.values[number] for number in step.args])
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from llm_coreml.artifact.flatbuffer import MalformedError, Table

_INLINE, _SEGMENT = 0, 1
_EXTERNAL = 1

# Numbers of ExecuTorch's scalar_type.fbs: torch's names and bytes per element.
SCALAR_TYPES = {
    0: ("uint8", 1),
    1: ("int8", 1),
    2: ("int16", 2),
    3: ("int32", 4),
    4: ("int64", 8),
    5: ("float16", 2),
    6: ("float32", 4),
    7: ("float64", 8),
    11: ("bool", 1),
    15: ("bfloat16", 2),
    27: ("uint16", 2),
    28: ("uint32", 4),
    29: ("uint64", 8),
}

Constant = int | bool | float | str | list[int] | list[float] | list[bool] | None


@dataclass(frozen=True)
class Place:
    """Where a tensor lives in the memory that the plan lays out."""

    arena: int
    offset: int


@dataclass(frozen=True)
class TensorSpec:
    """A tensor of the plan.

    Attributes:
        dtype: torch's name of the element type.
        shape: the sizes; upper bounds where `dynamic`.
        dynamic: whether smaller sizes than `shape` are allowed.
        place: where it lives, or None for a constant or for memory that a call brings.
        data: what it holds at first, or None if the file does not say.
        external: the name under which another file holds its data, or "".
        dim_order: the order of the dimensions in memory.
        nbytes: bytes that `shape` takes, or None for an unknown element type.
    """

    dtype: str
    shape: tuple[int, ...]
    dynamic: bool
    place: Place | None
    data: memoryview | None = field(repr=False)
    external: str
    dim_order: tuple[int, ...]
    nbytes: int | None

    @property
    def constant(self) -> bool:
        """Whether it never changes."""
        return self.data is not None and self.place is None


@dataclass(frozen=True)
class ValueList:
    """A list whose items are other values of the plan; None where an optional one is absent."""

    items: tuple[int | None, ...]


Value = TensorSpec | ValueList | Constant


@dataclass(frozen=True)
class Delegate:
    """What a backend other than ExecuTorch's own kernels runs.

    Attributes:
        method: name of the method it belongs to.
        index: its number within the method.
        backend: for Core ML, `CoreMLBackend`.
        compile_specs: the settings that the backend was lowered with.
        data: the backend's bytes, a view into the file.
    """

    method: str
    index: int
    backend: str
    compile_specs: dict[str, bytes]
    data: memoryview = field(repr=False)


@dataclass(frozen=True)
class Instruction:
    """One step of a plan.

    Attributes:
        kind: `kernel`, `delegate`, `move`, `jump_false` or `free`.
        target: kernel name such as `aten::_to_copy.out`, the delegate's number, the number of the
            instruction to jump to, or "".
        args: numbers of the plan's values; for `move` its source and destination.
    """

    kind: str
    target: str
    args: tuple[int, ...]


@dataclass(frozen=True)
class Method:
    """One method: its values, the sizes of its memory, and what happens to them, in order."""

    name: str
    values: tuple[Value, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    instructions: tuple[Instruction, ...]
    delegates: tuple[Delegate, ...]
    arenas: tuple[int, ...]


@dataclass(frozen=True)
class Pieces:
    """A run of tensors' data, cut at `offsets`."""

    data: memoryview
    offsets: tuple[int, ...]

    def take(self, number: int, size: int) -> memoryview:
        """Return `size` bytes of piece `number`.

        Raises:
            MalformedError: there is no such piece, or it is shorter.
        """
        if number >= len(self.offsets):
            raise MalformedError(f"it refers to data {number} of {len(self.offsets)}")
        start = self.offsets[number]
        if start + size > len(self.data):
            raise MalformedError(f"a tensor's {size} bytes run past the end of the data")
        return self.data[start : start + size]


@dataclass(frozen=True)
class Stored:
    """The data of a whole file that plans refer to.

    Attributes:
        inline: delegates' data within the program.
        segments: data behind the program.
        buffers: constants within the program.
        constants: constants in a segment, where the file keeps them there.
        initial: what mutable tensors start with.
    """

    inline: list[memoryview]
    segments: list[memoryview]
    buffers: list[memoryview]
    constants: Pieces | None
    initial: Pieces | None


def pick(items: list[memoryview], number: int, what: str) -> memoryview:
    """Return item `number`.

    Raises:
        MalformedError: there is none.
    """
    if not 0 <= number < len(items):
        raise MalformedError(f"it refers to {what} {number} of {len(items)}")
    return items[number]


def decode(plan: Table, stored: Stored) -> Method:
    """Decode the table of one method.

    Raises:
        MalformedError: it contradicts itself or refers to what does not exist.
    """
    name = plan.string(0)
    metadata = plan.table(1)
    if metadata is not None:
        metadata.string(0), metadata.string(1)
    arenas = plan.scalars(8, "long")
    values = _values(plan.tables(2), stored, arenas)
    delegates = tuple(
        _delegate(name, number, item, stored) for number, item in enumerate(plan.tables(7))
    )
    operators = [f"{item.string(0)}.{item.string(1)}".rstrip(".") for item in plan.tables(6)]
    chains = plan.tables(5)
    if len(chains) > 1:
        raise MalformedError(f"method '{name}' has {len(chains)} chains of instructions, not one")
    instructions = tuple(
        _instruction(item, operators, len(delegates))
        for chain in chains
        for item in chain.tables(2)
    )
    inputs, outputs = plan.scalars(3, "int"), plan.scalars(4, "int")
    used = [*inputs, *outputs, *(number for step in instructions for number in step.args)]
    if any(not 0 <= number < len(values) for number in used):
        raise MalformedError(f"method '{name}' uses a value that it does not have")
    return Method(name, values, inputs, outputs, instructions, delegates, arenas)


def _delegate(method: str, index: int, item: Table, stored: Stored) -> Delegate:
    processed = item.table(1)
    if processed is None:
        raise MalformedError("a delegate has no data")
    location = processed.scalar(0, "byte")
    number = processed.scalar(1, "uint")
    if location not in (_INLINE, _SEGMENT):
        raise MalformedError(f"a delegate's data is in the unknown place {location}")
    data = (
        pick(stored.inline, number, "data")
        if location == _INLINE
        else pick(stored.segments, number, "segment")
    )
    specs = {spec.string(0): bytes(spec.short_bytes(1)) for spec in item.tables(2)}
    return Delegate(method, index, item.string(0), specs, data)


_INSTRUCTIONS = ("", "kernel", "delegate", "move", "jump_false", "free")


def _instruction(item: Table, operators: list[str], delegates: int) -> Instruction:
    number = item.scalar(0, "ubyte")
    body = item.table(1)
    if not 0 < number < len(_INSTRUCTIONS) or body is None:
        raise MalformedError(f"it has an instruction of the unknown kind {number}")
    kind = _INSTRUCTIONS[number]
    first = body.scalar(0, "int")
    if kind == "move":
        return Instruction(kind, "", (first, body.scalar(1, "int")))
    if kind == "jump_false":
        return Instruction(kind, str(body.scalar(1, "int")), (first,))
    if kind == "free":
        return Instruction(kind, "", (first,))
    if not 0 <= first < (len(operators) if kind == "kernel" else delegates):
        raise MalformedError(f"an instruction calls {kind} {first}, which does not exist")
    name = operators[first] if kind == "kernel" else str(first)
    return Instruction(kind, name, body.scalars(1, "int"))


def _values(items: list[Table], stored: Stored, arenas: tuple[int, ...]) -> tuple[Value, ...]:
    """Decode EValues, and check that lists refer to values of their kind."""
    bodies = [(item.scalar(0, "ubyte"), item.table(1)) for item in items]
    values = tuple(_value(kind, body, stored, arenas) for kind, body in bodies)
    for (kind, _), value in zip(bodies, values, strict=True):
        if not isinstance(value, ValueList):
            continue
        for number in value.items:
            entry = values[number] if number is not None and 0 <= number < len(values) else None
            if kind == 7 and type(entry) is not int:
                raise MalformedError("a list of numbers refers to something else")
            if kind != 7 and number is not None and not isinstance(entry, TensorSpec):
                raise MalformedError("a list of tensors refers to something else")
    return values


def _value(kind: int, body: Table | None, stored: Stored, arenas: tuple[int, ...]) -> Value:
    if body is None or kind <= 1:
        return None
    if kind == 2:
        return body.scalar(0, "long")
    if kind == 3:
        return bool(body.scalar(0, "bool"))
    if kind == 4:
        return body.double(0)
    if kind == 5:
        return _tensor(body, stored, arenas)
    if kind == 6:
        return body.string(0)
    if kind == 7:
        return ValueList(body.scalars(0, "long"))
    if kind == 8:
        return [float(item) for item in body.scalars(0, "double")]
    if kind == 9:
        return [bool(item) for item in body.scalars(0, "ubyte")]
    if kind == 10:
        return ValueList(body.scalars(0, "int"))
    if kind == 11:
        items = body.scalars(0, "int")
        return ValueList(tuple(None if item == -1 else item for item in items))
    raise MalformedError(f"it has a value of the unknown kind {kind}")


def _tensor(body: Table, stored: Stored, arenas: tuple[int, ...]) -> TensorSpec:
    code = body.scalar(0, "byte")
    dtype, width = SCALAR_TYPES.get(code, (f"scalar type {code}", 0))
    shape = body.scalars(2, "int")
    if any(size < 0 for size in shape):
        raise MalformedError(f"a tensor has the shape {list(shape)}")
    nbytes = math.prod(shape) * width
    details = body.table(6)
    place = _place(details, nbytes, arenas) if details is not None else None
    extra = body.table(9)
    external = extra is not None and extra.scalar(2, "byte") == _EXTERNAL
    number = body.scalar(5, "uint")
    return TensorSpec(
        dtype=dtype,
        shape=shape,
        dynamic=body.scalar(8, "byte") != 0,
        place=place,
        data=_data(stored, number, nbytes, place) if number and not external else None,
        external=extra.string(1) if extra is not None and external else "",
        dim_order=body.scalars(3, "ubyte"),
        nbytes=nbytes if width else None,
    )


def _place(details: Table, nbytes: int, arenas: tuple[int, ...]) -> Place:
    arena = details.scalar(0, "uint")
    offset = details.scalar(1, "uint") | details.scalar(2, "uint") << 32
    # The first entry of the sizes is reserved, so that an arena's number is its place in the list.
    if not 0 < arena < len(arenas) or offset + nbytes > arenas[arena]:
        raise MalformedError(
            f"a tensor of {nbytes} bytes lies at byte {offset} of arena {arena}, "
            f"outside of the planned memory {list(arenas[:8])}"
        )
    return Place(arena, offset)


def _data(stored: Stored, number: int, nbytes: int, place: Place | None) -> memoryview:
    if place is not None:
        if stored.initial is None:
            raise MalformedError("a mutable tensor starts with data that the file does not hold")
        return stored.initial.take(number, nbytes)
    if stored.constants is not None:
        return stored.constants.take(number, nbytes)
    data = pick(stored.buffers, number, "constant")
    if len(data) < nbytes:
        raise MalformedError(f"a constant of {nbytes} bytes holds {len(data)}")
    return data[:nbytes]
