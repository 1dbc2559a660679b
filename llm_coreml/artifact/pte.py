"""The ExecuTorch container (`.pte`): its methods, their instructions and the delegates' data.

A `.pte` is a FlatBuffer (`program.fbs`, mark `ET12`), optionally followed by data segments that a
header between the first bytes locates. Nothing here executes; nothing is copied out of the file.

    for delegate in read_delegates("model.pte"):
        print(delegate.method, delegate.backend, len(delegate.data))
    print(constant_methods("model.pte")["get_max_seq_len"])
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from pathlib import Path

from llm_coreml.artifact.flatbuffer import MalformedError, Table, root
from llm_coreml.artifact.mapped import map_file
from llm_coreml.artifact.method_plan import (
    Constant,
    Delegate,
    Method,
    Pieces,
    Stored,
    TensorSpec,
    ValueList,
    decode,
    pick,
)
from llm_coreml.errors import ArtifactError

_MARK = b"ET12"
_HEADER = struct.Struct("<4sIQQQ")
_HEADER_AT = 8


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
    data = map_file(path)
    if not data:
        raise ArtifactError(f"'{path}' is empty; it should be an ExecuTorch program.")
    try:
        program_size, segments_at = _header(data)
        program = root(data[:program_size], _MARK)
        stored = _stored(program, data, program_size, segments_at)
        plans = [decode(plan, stored) for plan in program.tables(1)]
        keys = program.tables(7)
        named = {
            item.string(0): pick(stored.segments, item.scalar(1, "uint"), "segment")
            for item in keys
        }
        if len(named) != len(keys):
            raise MalformedError("two pieces of its data have one name")
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
        values = [_resolved(method, number) for number in method.outputs]
        if len(values) == 1 and not isinstance(values[0], TensorSpec):
            found[name] = values[0]
        elif all(isinstance(value, bool) for value in values):
            found[name] = [value for value in values if isinstance(value, bool)]
        elif all(isinstance(value, int) for value in values):
            found[name] = [value for value in values if isinstance(value, int)]
        elif all(isinstance(value, float) for value in values):
            found[name] = [value for value in values if isinstance(value, float)]
    return found


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


def _stored(program: Table, data: memoryview, program_size: int, base: int) -> Stored:
    """Locate the data that plans refer to."""
    segments, used = [], []
    for item in program.tables(4):
        offset, size = item.scalar(0, "ulong"), item.scalar(1, "ulong")
        start = base + offset
        if start + size > len(data):
            raise MalformedError(
                f"it is truncated: a segment ends at byte {start + size} of {len(data)}"
            )
        segments.append(data[start : start + size])
        if size:
            used.append((start, start + size))
    used.sort()
    # Segments that share bytes would let one reader vouch for what another one changes.
    if any(
        start < end for (_, end), (start, _) in zip([(0, program_size), *used], used, strict=False)
    ):
        raise MalformedError("its segments overlap")
    mutable = program.tables(6)
    if len(mutable) > 1:
        raise MalformedError(f"it has {len(mutable)} segments of mutable data, not one")
    return Stored(
        [item.bytes(0) for item in program.tables(3)],
        segments,
        [item.bytes(0) for item in program.tables(2)],
        _pieces(program.table(5), segments),
        _pieces(mutable[0] if mutable else None, segments),
    )


def _pieces(table: Table | None, segments: list[memoryview]) -> Pieces | None:
    offsets = table.scalars(1, "ulong") if table is not None else ()
    if table is None or not offsets:
        return None
    return Pieces(pick(segments, table.scalar(0, "uint"), "segment"), offsets)


def _resolved(method: Method, number: int) -> TensorSpec | Constant:
    value = method.values[number]
    if not isinstance(value, ValueList):
        return value
    items = [method.values[item] for item in value.items if item is not None]
    return [item for item in items if isinstance(item, int)]
