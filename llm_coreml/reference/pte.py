"""The ExecuTorch container (`.pte`): its methods, their instructions and the delegates' data.

A `.pte` is a FlatBuffer (`program.fbs`, mark `ET12`), optionally followed by data segments that a
header between the first bytes locates. Nothing here executes; nothing is copied out of the file.

    for delegate in read_delegates("model.pte"):
        print(delegate.method, delegate.backend, len(delegate.data))
    print(constant_methods("model.pte")["get_max_seq_len"])
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass, field
from pathlib import Path

from llm_coreml.errors import ArtifactError
from llm_coreml.reference.flatbuffer import MalformedError, Table, root

_MARK = b"ET12"
_HEADER = struct.Struct("<4sIQQQ")
_HEADER_AT = 8
_INLINE, _SEGMENT = 0, 1

# Numbers of ExecuTorch's scalar_type.fbs, by torch's names.
SCALAR_TYPES = {
    0: "uint8",
    1: "int8",
    2: "int16",
    3: "int32",
    4: "int64",
    5: "float16",
    6: "float32",
    7: "float64",
    11: "bool",
    15: "bfloat16",
    27: "uint16",
    28: "uint32",
    29: "uint64",
}

Constant = int | bool | float | str | list[int] | list[float] | list[bool] | None


@dataclass(frozen=True)
class TensorSpec:
    """A tensor of the plan.

    Attributes:
        dtype: torch's name of the element type.
        shape: the sizes; upper bounds where `dynamic`.
        dynamic: whether smaller sizes than `shape` are allowed.
        constant: whether its data is stored in the file.
    """

    dtype: str
    shape: tuple[int, ...]
    dynamic: bool
    constant: bool


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
        target: kernel name such as `aten::_to_copy.out`, or the delegate's number, or "".
        args: numbers of the plan's values.
    """

    kind: str
    target: str
    args: tuple[int, ...]


@dataclass(frozen=True)
class Method:
    """One method: its values and what happens to them, in order."""

    name: str
    values: tuple[TensorSpec | Constant, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    instructions: tuple[Instruction, ...]
    delegates: tuple[Delegate, ...]


@dataclass(frozen=True)
class Container:
    """A whole `.pte`: methods by name, and data that several methods share."""

    path: Path
    methods: dict[str, Method]
    named_data: dict[str, memoryview] = field(repr=False)


def read(path: str | Path) -> Container:
    """Read the `.pte` at `path`; the data stays mapped from the file.

    Raises:
        ArtifactError: the file is absent, empty, truncated, or no ExecuTorch program.
    """
    path = Path(path)
    data = _map(path)
    try:
        program_size, segments_at = _header(data)
        program = root(data[:program_size], _MARK)
        segments = [
            _slice(data, segments_at + item.scalar(0, "ulong"), item.scalar(1, "ulong"))
            for item in program.tables(4)
        ]
        inline = [item.bytes(0) for item in program.tables(3)]
        # Not needed, but a file that is cut within its constants must not pass for a whole one.
        for buffer in program.tables(2):
            buffer.bytes(0)
        plans = [_method(plan, inline, segments) for plan in program.tables(1)]
        named = {
            item.string(0): _pick(segments, item.scalar(1, "uint"), "segment")
            for item in program.tables(7)
        }
    except MalformedError as error:
        raise ArtifactError(
            f"'{path}' is not a readable ExecuTorch program: {error}. "
            "Export it again, or copy it again if it was transferred."
        ) from error
    if not plans:
        raise ArtifactError(f"'{path}' is an ExecuTorch program without a method.")
    if len({plan.name for plan in plans}) != len(plans):
        raise ArtifactError(f"'{path}' holds two methods of one name.")
    return Container(path, {plan.name: plan for plan in plans}, named)


def read_delegates(path: str | Path) -> list[Delegate]:
    """Return the delegates of all methods of the `.pte` at `path`, in the file's order.

    Raises:
        ArtifactError: the file cannot be read as an ExecuTorch program.
    """
    return [delegate for method in read(path).methods.values() for delegate in method.delegates]


def constant_methods(path: str | Path) -> dict[str, Constant]:
    """Return what the methods without inputs and instructions give, by name.

    A method with several outputs gives a list. ExecuTorch stores a list of one number as the
    number, so `get_eos_ids` of a model with one end token is an int here, as it is for a runner.

    Raises:
        ArtifactError: the file cannot be read as an ExecuTorch program.
    """
    return constants_of(read(path))


def constants_of(container: Container) -> dict[str, Constant]:
    """Return what `constant_methods` returns, for a container that is already read."""
    found: dict[str, Constant] = {}
    for name, method in container.methods.items():
        if method.inputs or method.instructions or not method.outputs:
            continue
        values = [method.values[number] for number in method.outputs]
        if len(values) == 1 and not isinstance(values[0], TensorSpec):
            found[name] = values[0]
        elif all(isinstance(value, bool) for value in values):
            found[name] = [value for value in values if isinstance(value, bool)]
        elif all(isinstance(value, int) for value in values):
            found[name] = [value for value in values if isinstance(value, int)]
        elif all(isinstance(value, float) for value in values):
            found[name] = [value for value in values if isinstance(value, float)]
    return found


def _map(path: Path) -> memoryview:
    try:
        with path.open("rb") as file:
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except ValueError as error:
        raise ArtifactError(f"'{path}' is empty; it should be an ExecuTorch program.") from error
    except OSError as error:
        raise ArtifactError(f"'{path}' cannot be read: {error.strerror}.") from error


def _header(data: memoryview) -> tuple[int, int]:
    """Return the size of the FlatBuffer and where segments start, both checked."""
    if len(data) < _HEADER_AT + _HEADER.size:
        raise MalformedError(f"{len(data)} bytes are too few")
    magic, length, program, base, segments = _HEADER.unpack_from(data, _HEADER_AT)
    if magic != b"eh00" or length < _HEADER.size - 8:
        return len(data), 0
    if length < _HEADER.size:
        segments = 0
    needed = max(program, base + segments)
    if needed > len(data):
        raise MalformedError(f"it is truncated: {len(data)} bytes of at least {needed}")
    return program, base


def _slice(data: memoryview, offset: int, size: int) -> memoryview:
    if offset + size > len(data):
        raise MalformedError(
            f"it is truncated: a segment ends at byte {offset + size} of {len(data)}"
        )
    return data[offset : offset + size]


def _pick(items: list[memoryview], number: int, what: str) -> memoryview:
    if not 0 <= number < len(items):
        raise MalformedError(f"it refers to {what} {number} of {len(items)}")
    return items[number]


def _method(plan: Table, inline: list[memoryview], segments: list[memoryview]) -> Method:
    name = plan.string(0)
    metadata = plan.table(1)
    if metadata is not None:
        metadata.string(0), metadata.string(1)
    plan.scalars(8, "long")
    values = _values(plan.tables(2))
    delegates = tuple(
        _delegate(name, number, item, inline, segments)
        for number, item in enumerate(plan.tables(7))
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
    return Method(name, values, inputs, outputs, instructions, delegates)


def _delegate(
    method: str,
    index: int,
    item: Table,
    inline: list[memoryview],
    segments: list[memoryview],
) -> Delegate:
    processed = item.table(1)
    if processed is None:
        raise MalformedError("a delegate has no data")
    location = processed.scalar(0, "byte")
    number = processed.scalar(1, "uint")
    if location not in (_INLINE, _SEGMENT):
        raise MalformedError(f"a delegate's data is in the unknown place {location}")
    data = (
        _pick(inline, number, "data") if location == _INLINE else _pick(segments, number, "segment")
    )
    specs = {spec.string(0): bytes(spec.bytes(1)) for spec in item.tables(2)}
    return Delegate(method, index, item.string(0), specs, data)


_INSTRUCTIONS = ("", "kernel", "delegate", "move", "jump_false", "free")


def _instruction(item: Table, operators: list[str], delegates: int) -> Instruction:
    number = item.scalar(0, "ubyte")
    body = item.table(1)
    if not 0 < number < len(_INSTRUCTIONS) or body is None:
        raise MalformedError(f"it has an instruction of the unknown kind {number}")
    kind = _INSTRUCTIONS[number]
    if kind not in ("kernel", "delegate"):
        return Instruction(kind, "", ())
    target = body.scalar(0, "int")
    if not 0 <= target < (len(operators) if kind == "kernel" else delegates):
        raise MalformedError(f"an instruction calls {kind} {target}, which does not exist")
    name = operators[target] if kind == "kernel" else str(target)
    return Instruction(kind, name, body.scalars(1, "int"))


def _values(items: list[Table]) -> tuple[TensorSpec | Constant, ...]:
    """Decode EValues; lists of ints refer to other EValues, so they come last."""
    bodies = [(item.scalar(0, "ubyte"), item.table(1)) for item in items]
    simple = [_value(kind, body) for kind, body in bodies]
    for number, (kind, body) in enumerate(bodies):
        if kind != 7 or body is None:
            continue
        chosen = []
        for index in body.scalars(0, "long"):
            entry = simple[index] if 0 <= index < len(simple) else None
            if type(entry) is not int:
                raise MalformedError("a list of numbers refers to something else")
            chosen.append(entry)
        simple[number] = chosen
    return tuple(simple)


def _value(kind: int, body: Table | None) -> TensorSpec | Constant:
    if body is None or kind <= 1:
        return None
    if kind == 2:
        return body.scalar(0, "long")
    if kind == 3:
        return bool(body.scalar(0, "bool"))
    if kind == 4:
        return body.double(0)
    if kind == 5:
        return _tensor(body)
    if kind == 6:
        return body.string(0)
    if kind == 8:
        return [float(item) for item in body.scalars(0, "double")]
    if kind == 9:
        return [bool(item) for item in body.scalars(0, "ubyte")]
    # Lists of ints are resolved by the caller; lists of tensors occur in no method we run.
    return None


def _tensor(body: Table) -> TensorSpec:
    code = body.scalar(0, "byte")
    return TensorSpec(
        dtype=SCALAR_TYPES.get(code, f"scalar type {code}"),
        shape=body.scalars(2, "int"),
        dynamic=body.scalar(8, "byte") != 0,
        constant=body.scalar(5, "uint") != 0,
    )
