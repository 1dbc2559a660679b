"""A bounded reader of FlatBuffers tables, for files that nobody vouches for.

ExecuTorch's own deserializer unpacks every table, copies the delegates' data (gigabytes of weights)
and trusts each offset and length. This one visits only what is asked for, checks each read against
the buffer, returns data as views, and stops after as many visits as an honest file of this size
can need; a file whose tables point at one another in circles ends in an error, not in a hang.

    program = root(memoryview(data), b"ET12")
    plans = program.tables(1)
"""

from __future__ import annotations

import struct

_FORMATS = {
    "bool": struct.Struct("<?"),
    "byte": struct.Struct("<b"),
    "ubyte": struct.Struct("<B"),
    "ushort": struct.Struct("<H"),
    "int": struct.Struct("<i"),
    "uint": struct.Struct("<I"),
    "long": struct.Struct("<q"),
    "ulong": struct.Struct("<Q"),
    "double": struct.Struct("<d"),
}


# The largest plans in use need a hundredth of this, which takes seconds.
_MAX_VISITS = 10_000_000


class MalformedError(ValueError):
    """The bytes are no well-formed FlatBuffer of the expected kind."""


class _Buffer:
    """The bytes and the number of visits left."""

    __slots__ = ("data", "left", "size")

    def __init__(self, data: memoryview) -> None:
        self.data = data
        self.size = len(data)
        self.left = min(4 * len(data) + 1024, _MAX_VISITS)

    def spend(self, count: int) -> None:
        self.left -= count
        if self.left < 0:
            raise MalformedError("its tables refer to one another too often")

    def scalar(self, kind: str, position: int) -> int:
        form = _FORMATS[kind]
        self.spend(1)
        if position < 0 or position + form.size > self.size:
            raise MalformedError(f"an offset points to byte {position} of {self.size}")
        value: int = form.unpack_from(self.data, position)[0]
        return value


class Table:
    """One table; fields are addressed by their number in the schema."""

    __slots__ = ("_buffer", "_position", "_vtable", "_vtable_size")

    def __init__(self, buffer: _Buffer, position: int) -> None:
        self._buffer = buffer
        self._position = position
        self._vtable = position - buffer.scalar("int", position)
        self._vtable_size = buffer.scalar("ushort", self._vtable)

    def _field(self, number: int) -> int:
        slot = 4 + 2 * number
        if slot + 2 > self._vtable_size:
            return 0
        offset = self._buffer.scalar("ushort", self._vtable + slot)
        return self._position + offset if offset else 0

    def scalar(self, number: int, kind: str, default: int = 0) -> int:
        """Return a scalar field, or `default` where the file omits it."""
        position = self._field(number)
        return self._buffer.scalar(kind, position) if position else default

    def double(self, number: int) -> float:
        """Return a field of type double."""
        position = self._field(number)
        return float(self._buffer.scalar("double", position)) if position else 0.0

    def table(self, number: int) -> Table | None:
        """Return the table that a field refers to, or None."""
        position = self._target(number)
        return Table(self._buffer, position) if position else None

    def _target(self, number: int) -> int:
        position = self._field(number)
        return position + self._buffer.scalar("uint", position) if position else 0

    def _vector(self, number: int, width: int) -> tuple[int, int]:
        position = self._target(number)
        if not position:
            return 0, 0
        count = self._buffer.scalar("uint", position)
        if position + 4 + count * width > self._buffer.size:
            raise MalformedError(f"a list of {count} items runs past the end")
        return position + 4, count

    def tables(self, number: int) -> list[Table]:
        """Return a field that is a list of tables."""
        start, count = self._vector(number, 4)
        places = range(start, start + 4 * count, 4)
        return [Table(self._buffer, at + self._buffer.scalar("uint", at)) for at in places]

    def scalars(self, number: int, kind: str) -> tuple[int, ...]:
        """Return a field that is a list of scalars."""
        width = _FORMATS[kind].size
        start, count = self._vector(number, width)
        self._buffer.spend(count)
        if not count:
            return ()
        view = self._buffer.data[start : start + count * width]
        return tuple(item[0] for item in _FORMATS[kind].iter_unpack(view))

    def bytes(self, number: int) -> memoryview:
        """Return a field that is a list of bytes, as a view."""
        start, count = self._vector(number, 1)
        return self._buffer.data[start : start + count]

    def short_bytes(self, number: int) -> memoryview:
        """Return as `bytes` does; for what is copied, so that many cannot share one long list."""
        view = self.bytes(number)
        self._buffer.spend(len(view))
        return view

    def string(self, number: int) -> str:
        """Return a field of type string, or an empty one where the file omits it."""
        start, count = self._vector(number, 1)
        if start and start + count >= self._buffer.size:
            raise MalformedError("a name runs past the end")
        view = self._buffer.data[start : start + count]
        self._buffer.spend(count)
        try:
            return str(view, "utf-8")
        except UnicodeDecodeError as error:
            raise MalformedError("a name is not UTF-8") from error


def root(data: memoryview, identifier: bytes) -> Table:
    """Return the root table of `data`.

    Raises:
        MalformedError: the four bytes of `identifier` are not where they belong.
    """
    if len(data) < 8 or bytes(data[4:8]) != identifier:
        raise MalformedError(f"it does not carry the mark {identifier.decode()}")
    buffer = _Buffer(data)
    return Table(buffer, buffer.scalar("uint", 0))
