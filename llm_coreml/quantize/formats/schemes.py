"""The weight formats: one frozen dataclass each, with what Core ML allows and what it costs.

    scheme = IntGroup(bits=4, group_size=32)
    scheme.check("layers.0.mlp.down_proj", (2048, 8192))   # refuses what does not divide
    scheme.bits_per_weight((2048, 8192))                   # 4.5

Adding a format: one dataclass here, one handler in `round.py`, one row of golden values.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, get_args

from llm_coreml.errors import ConfigError, UnsupportedError

CODEBOOK_BITS = (1, 2, 3, 4, 6, 8)
# Core ML has integers of 4 and 8 bits; the others are looked up in a table of int8.
INTEGER_BITS = (4, 8)
GROUP_BITS = (2, 3, 4, 6, 8)
MXFP4_GROUP = 32
VECTORS = (1, 2, 4)
# A scale on what a table gives, which not every compute unit takes.
SCALED_TABLE = "scaled table"
# Below it coremltools never lets a scale follow a look-up in int8: it scales the tables instead,
# and says that iOS26 has fixed what that avoids (pass `canonicalize_quantized_lut_pattern`).
_SCALED_INT8_TABLE = "iOS26"
ZeroPoint = Literal["none", "int", "float"]
_ZERO_POINTS: Mapping[str, str] = MappingProxyType(
    {"none": "", "int": ", integer zero points", "float": ", float zero points"}
)


class Scheme(ABC):
    """How one weight matrix `[out_features, in_features]` is stored."""

    @property
    @abstractmethod
    def name(self) -> str:
        """Value of `--scheme`."""

    @property
    @abstractmethod
    def label(self) -> str:
        """Short text for tables and manifests, for example `int4 group 32`."""

    @property
    @abstractmethod
    def bits(self) -> int:
        """Bits of one stored code; 16 for unquantized weights."""

    @property
    def traits(self) -> tuple[str, ...]:
        """What a target may be known not to take, see `rules`."""
        return (self.name,)

    @property
    def minimum_os(self) -> str:
        """Oldest system whose Core ML runs the format, by its name among deployment targets."""
        return "iOS18"

    @property
    def calibrated(self) -> bool:
        """Whether calibration can choose its codes."""
        return True

    @abstractmethod
    def check(self, tensor: str, shape: tuple[int, int]) -> None:
        """Refuse a matrix that the format cannot hold.

        Raises:
            UnsupportedError: the shape does not divide.
        """

    @abstractmethod
    def overhead_bits(self, shape: tuple[int, int]) -> int:
        """Bits that scales or tables of a matrix of `shape` take, beside its codes."""

    def code_bits(self, shape: tuple[int, int]) -> int:
        """Bits that the codes of a matrix of `shape` take."""
        return self.bits * shape[0] * shape[1]

    def stored_bits(self, shape: tuple[int, int]) -> int:
        """Bits that a matrix of `shape` takes, which is what the artifact's file has for it."""
        return self.code_bits(shape) + self.overhead_bits(shape)

    def bits_per_weight(self, shape: tuple[int, int]) -> float:
        """Bits per weight including scales and tables."""
        return self.stored_bits(shape) / (shape[0] * shape[1])


@dataclass(frozen=True)
class IntGroup(Scheme):
    """Integers, one scale of `scale_bits` per `group_size` consecutive inputs of a row."""

    bits: int = 4
    group_size: int = 32
    scale_bits: int = 16
    zero_point: ZeroPoint = "none"

    def __post_init__(self) -> None:
        _check_integers(self.bits, self.zero_point, GROUP_BITS)
        if self.group_size < 1:
            raise ConfigError(f"--group-size is {self.group_size}; it must be at least 1.")

    @property
    def name(self) -> str:
        return f"int{self.bits}-group"

    @property
    def traits(self) -> tuple[str, ...]:
        return (self.name, *([] if self.bits in INTEGER_BITS else [SCALED_TABLE]))

    @property
    def minimum_os(self) -> str:
        return "iOS18" if self.bits in INTEGER_BITS else _SCALED_INT8_TABLE

    @property
    def label(self) -> str:
        return f"int{self.bits} group {self.group_size}{_ZERO_POINTS[self.zero_point]}"

    def check(self, tensor: str, shape: tuple[int, int]) -> None:
        if shape[1] % self.group_size:
            raise UnsupportedError(
                f"{tensor} has {shape[1]} inputs, which --group-size {self.group_size} does not "
                f"divide; use a group size that does, such as {_largest_divisor(shape[1])}, "
                f"or int{8 if self.bits > 4 else 4}-channel, which has no groups."
            )

    def overhead_bits(self, shape: tuple[int, int]) -> int:
        native = self.bits in INTEGER_BITS
        integer = self.bits if native else 8
        per_group = self.scale_bits + _zero_point_bits(self.zero_point, integer, self.scale_bits)
        table: int = 0 if native else 8 * 2**self.bits
        return per_group * shape[0] * (shape[1] // self.group_size) + table


@dataclass(frozen=True)
class IntChannel(Scheme):
    """int4 or int8, one scale of `scale_bits` per output row."""

    bits: int = 8
    scale_bits: int = 16
    zero_point: ZeroPoint = "none"

    def __post_init__(self) -> None:
        _check_integers(self.bits, self.zero_point, INTEGER_BITS)

    @property
    def name(self) -> str:
        return f"int{self.bits}-channel"

    @property
    def minimum_os(self) -> str:
        # Before, a zero point is of the codes' type.
        return "iOS16" if self.bits == 8 and self.zero_point != "float" else "iOS18"

    @property
    def label(self) -> str:
        return f"int{self.bits} per channel{_ZERO_POINTS[self.zero_point]}"

    def check(self, tensor: str, shape: tuple[int, int]) -> None:
        """Any shape fits."""

    def overhead_bits(self, shape: tuple[int, int]) -> int:
        per_row = self.scale_bits + _zero_point_bits(self.zero_point, self.bits, self.scale_bits)
        return per_row * shape[0]


@dataclass(frozen=True)
class Mxfp4(Scheme):
    """4-bit floats, one power of two for 32 consecutive inputs of a row."""

    bits: int = 4
    scale_bits: int = 16

    name = "mxfp4"
    traits = ("mxfp4", SCALED_TABLE)
    minimum_os = _SCALED_INT8_TABLE

    @property
    def calibrated(self) -> bool:
        return False

    @property
    def label(self) -> str:
        return f"mxfp4 group {MXFP4_GROUP}"

    def check(self, tensor: str, shape: tuple[int, int]) -> None:
        if shape[1] % MXFP4_GROUP:
            raise UnsupportedError(
                f"{tensor} has {shape[1]} inputs, which the {MXFP4_GROUP} of an mxfp4 group do not "
                "divide; use int4-channel, which has no groups."
            )

    def overhead_bits(self, shape: tuple[int, int]) -> int:
        table: int = 8 * 2**self.bits
        return self.scale_bits * shape[0] * (shape[1] // MXFP4_GROUP) + table


@dataclass(frozen=True)
class Codebook(Scheme):
    """Codes into tables of 2^bits values of `scale_bits`.

    One table serves a block of `rows` output rows and `columns` inputs, None being all of them. An
    entry is the weights of `vector` consecutive rows for one input. With `row_scale`, each row has
    a factor of `scale_bits`.
    """

    bits: int = 4
    rows: int | None = 16
    scale_bits: int = 16
    columns: int | None = None
    vector: int = 1
    row_scale: bool = False

    def __post_init__(self) -> None:
        for flag, size in (("rows", self.rows), ("columns", self.columns)):
            if size is not None and size < 1:
                raise ConfigError(f"--codebook-{flag} is {size}; it must be at least 1.")
        if self.vector not in VECTORS:
            raise ConfigError(f"--codebook-vector is {self.vector}; it must be 1, 2 or 4.")
        if self.rows is not None and self.rows % self.vector:
            raise ConfigError(
                f"--codebook-vector {self.vector} does not divide --codebook-rows {self.rows}; an "
                "entry of a table belongs to as many rows."
            )
        if self.row_scale and self.vector > 1:
            raise UnsupportedError(
                "--codebook-scale and --codebook-vector exclude each other; drop one of them."
            )

    name = "codebook"

    @property
    def calibrated(self) -> bool:
        return self.vector == 1 and not self.row_scale

    @property
    def traits(self) -> tuple[str, ...]:
        return (self.name, *([SCALED_TABLE] if self.row_scale else []))

    @property
    def minimum_os(self) -> str:
        plain = self.vector == 1 and not self.row_scale and self.bits != 3
        return "iOS16" if plain and self.rows is self.columns is None else "iOS18"

    @property
    def label(self) -> str:
        sizes = ((self.rows, "rows"), (self.columns, "columns"))
        block = " x ".join(f"{size} {what}" for size, what in sizes if size is not None)
        entries = "" if self.vector == 1 else f" for {self.vector} rows"
        scaled = ", scaled rows" if self.row_scale else ""
        tables = f"{block} per table" if block else "one table"
        return f"codebook {self.bits} bit{entries}, {tables}{scaled}"

    def check(self, tensor: str, shape: tuple[int, int]) -> None:
        sizes = (("rows", self.rows, shape[0]), ("columns", self.columns, shape[1]))
        for flag, size, count in sizes:
            if size is not None and count % size:
                raise UnsupportedError(
                    f"{tensor} has {count} {flag}, which --codebook-{flag} {size} does not divide; "
                    f"use a number that does, such as {_largest_divisor(count, 16)}."
                )
        if shape[0] % self.vector:
            raise UnsupportedError(
                f"{tensor} has {shape[0]} rows, which --codebook-vector {self.vector} does not "
                "divide; use 1."
            )

    def tables(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Return how many groups of rows, and of columns, have tables of their own."""
        rows, columns = self.rows or shape[0], self.columns or shape[1]
        return shape[0] // rows, shape[1] // columns

    def code_bits(self, shape: tuple[int, int]) -> int:
        return self.bits * (shape[0] // self.vector) * shape[1]

    def overhead_bits(self, shape: tuple[int, int]) -> int:
        row_groups, column_groups = self.tables(shape)
        entries: int = row_groups * column_groups * 2**self.bits * self.vector
        return self.scale_bits * (entries + (shape[0] if self.row_scale else 0))


@dataclass(frozen=True)
class TableGroup(Scheme):
    """Codes into one table of 2^bits values, one scale per `group_size` inputs; only imported."""

    bits: int = 4
    group_size: int = 64
    scale_bits: int = 16

    name = "table-group"
    traits = ("table-group", SCALED_TABLE)
    minimum_os = "iOS18"

    @property
    def calibrated(self) -> bool:
        return False

    @property
    def label(self) -> str:
        return f"table {self.bits} bit, scaled groups of {self.group_size}"

    def __post_init__(self) -> None:
        if self.group_size < 1:
            raise ConfigError(f"a group of a table is {self.group_size}; it must be at least 1.")

    def check(self, tensor: str, shape: tuple[int, int]) -> None:
        if shape[1] % self.group_size:
            raise UnsupportedError(
                f"{tensor} has {shape[1]} inputs, which groups of {self.group_size} do not divide; "
                "use another scheme."
            )

    def overhead_bits(self, shape: tuple[int, int]) -> int:
        scales = shape[0] * (shape[1] // self.group_size)
        table: int = 2**self.bits
        return self.scale_bits * (scales + table)


@dataclass(frozen=True)
class Unquantized(Scheme):
    """Weights as they are, in the program's floating-point precision."""

    bits: int = 16

    name = "none"
    minimum_os = "iOS15"

    @property
    def calibrated(self) -> bool:
        return False

    @property
    def label(self) -> str:
        return f"fp{self.bits}"

    def check(self, tensor: str, shape: tuple[int, int]) -> None:
        """Any shape fits."""

    def overhead_bits(self, shape: tuple[int, int]) -> int:
        return 0


SCHEMES: Mapping[str, str] = MappingProxyType(
    {
        "int4-group": "int4, one scale per group of inputs (--group-size); GPU and CPU",
        "int4-channel": "int4, one scale per output row; every target, loses the most",
        "int8-group": "int8, one scale per group of inputs (--group-size); GPU and CPU",
        "int8-channel": "int8, one scale per output row; every target",
        "codebook": "1, 2, 3, 4, 6 or 8 bit tables, see --codebook-rows; every target",
        "int2-group": "int2, looked up, one scale per group of inputs; iOS26, untried on devices",
        "int3-group": "int3, looked up, one scale per group of inputs; iOS26, untried on devices",
        "int6-group": "int6, looked up, one scale per group of inputs; iOS26, untried on devices",
        "mxfp4": "4-bit floats, one scale per 32 inputs; iOS26, untried on devices",
        "none": "weights as they are, fp16 or fp32",
    }
)


def _check_integers(bits: int, zero_point: str, allowed: tuple[int, ...]) -> None:
    if bits not in allowed:
        *others, last = map(str, allowed)
        raise UnsupportedError(
            f"Integers with such scales have {', '.join(others)} or {last} bits, not {bits}; use a "
            "codebook, which has 1, 2, 3, 4, 6 or 8."
        )
    if zero_point not in get_args(ZeroPoint):
        raise ConfigError(f"--zero-point is '{zero_point}'; it must be none, int or float.")


def _zero_point_bits(zero_point: ZeroPoint, bits: int, scale_bits: int) -> int:
    """Return the bits of one zero point: as the codes if an integer, as the scales if a float."""
    return {"none": 0, "int": bits, "float": scale_bits}[zero_point]


def _largest_divisor(size: int, limit: int = 32) -> int:
    return max(n for n in range(1, limit + 1) if size % n == 0)
