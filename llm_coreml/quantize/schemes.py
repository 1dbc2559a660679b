"""The weight formats: one frozen dataclass each, with what Core ML allows and what it costs.

    scheme = IntGroup(bits=4, group_size=32)
    scheme.check("layers.0.mlp.down_proj", (2048, 8192))   # refuses what does not divide
    scheme.bits_per_weight((2048, 8192))                   # 4.5

Adding a format: one dataclass here, one handler in `apply.py`, one row of golden values.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, get_args

from llm_coreml.errors import ConfigError, UnsupportedError

CODEBOOK_BITS = (1, 2, 3, 4, 6, 8)
INTEGER_BITS = (4, 8)
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

    @abstractmethod
    def check(self, tensor: str, shape: tuple[int, int]) -> None:
        """Refuse a matrix that the format cannot hold.

        Raises:
            UnsupportedError: the shape does not divide.
        """

    @abstractmethod
    def overhead_bits(self, shape: tuple[int, int]) -> int:
        """Bits that scales or tables of a matrix of `shape` take, beside its codes."""

    def bits_per_weight(self, shape: tuple[int, int]) -> float:
        """Bits per weight including scales and tables."""
        return self.bits + self.overhead_bits(shape) / (shape[0] * shape[1])


@dataclass(frozen=True)
class IntGroup(Scheme):
    """int4 or int8, one scale of `scale_bits` per `group_size` consecutive inputs of a row."""

    bits: int = 4
    group_size: int = 32
    scale_bits: int = 16
    zero_point: ZeroPoint = "none"

    def __post_init__(self) -> None:
        _check_integers(self.bits, self.zero_point)
        if self.group_size < 1:
            raise ConfigError(f"--group-size is {self.group_size}; it must be at least 1.")

    @property
    def name(self) -> str:
        return f"int{self.bits}-group"

    @property
    def label(self) -> str:
        return f"int{self.bits} group {self.group_size}{_ZERO_POINTS[self.zero_point]}"

    def check(self, tensor: str, shape: tuple[int, int]) -> None:
        if shape[1] % self.group_size:
            raise UnsupportedError(
                f"{tensor} has {shape[1]} inputs, which --group-size {self.group_size} does not "
                f"divide; use a group size that does, such as {_largest_divisor(shape[1])}, "
                f"or int{self.bits}-channel, which has no groups."
            )

    def overhead_bits(self, shape: tuple[int, int]) -> int:
        per_group = self.scale_bits + _zero_point_bits(self.zero_point, self.bits, self.scale_bits)
        return per_group * shape[0] * (shape[1] // self.group_size)


@dataclass(frozen=True)
class IntChannel(Scheme):
    """int4 or int8, one scale of `scale_bits` per output row."""

    bits: int = 8
    scale_bits: int = 16
    zero_point: ZeroPoint = "none"

    def __post_init__(self) -> None:
        _check_integers(self.bits, self.zero_point)

    @property
    def name(self) -> str:
        return f"int{self.bits}-channel"

    @property
    def label(self) -> str:
        return f"int{self.bits} per channel{_ZERO_POINTS[self.zero_point]}"

    def check(self, tensor: str, shape: tuple[int, int]) -> None:
        """Any shape fits."""

    def overhead_bits(self, shape: tuple[int, int]) -> int:
        per_row = self.scale_bits + _zero_point_bits(self.zero_point, self.bits, self.scale_bits)
        return per_row * shape[0]


@dataclass(frozen=True)
class Codebook(Scheme):
    """Codes into tables of 2^bits values of `scale_bits`.

    One table serves `rows` output rows, or `columns` inputs of every row; one of the two is None.
    """

    bits: int = 4
    rows: int | None = 16
    scale_bits: int = 16
    columns: int | None = None

    def __post_init__(self) -> None:
        for flag, size in (("rows", self.rows), ("columns", self.columns)):
            if size is not None and size < 1:
                raise ConfigError(f"--codebook-{flag} is {size}; it must be at least 1.")
        if self.rows is not None and self.columns is not None:
            raise UnsupportedError(
                "--codebook-rows and --codebook-columns together ask for a table per block, which "
                "the lowering of torchao's codebooks does not take; drop one of them."
            )

    name = "codebook"

    @property
    def label(self) -> str:
        size = f"{self.columns} columns" if self.rows is None else f"{self.rows} rows"
        return f"codebook {self.bits} bit, {size} per table"

    def check(self, tensor: str, shape: tuple[int, int]) -> None:
        for flag, size, count in (
            ("rows", self.rows, shape[0]),
            ("columns", self.columns, shape[1]),
        ):
            if size is not None and count % size:
                raise UnsupportedError(
                    f"{tensor} has {count} {flag}, which --codebook-{flag} {size} does not divide; "
                    f"use a number that does, such as {_largest_divisor(count, 16)}."
                )

    def tables(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Return how many groups of rows, and of columns, have tables of their own."""
        rows, columns = self.rows or shape[0], self.columns or shape[1]
        return shape[0] // rows, shape[1] // columns

    def overhead_bits(self, shape: tuple[int, int]) -> int:
        row_groups, column_groups = self.tables(shape)
        return int(self.scale_bits * 2**self.bits * row_groups * column_groups)


@dataclass(frozen=True)
class Unquantized(Scheme):
    """Weights as they are, in the program's floating-point precision."""

    bits: int = 16

    name = "none"

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
        "codebook": "1, 2, 3, 4, 6 or 8 bit tables, see --codebook-rows and -columns; every target",
        "none": "weights as they are, fp16 or fp32",
    }
)


def _check_integers(bits: int, zero_point: str) -> None:
    if bits not in INTEGER_BITS:
        raise UnsupportedError(
            f"Core ML holds integer weights of 4 and 8 bits, not of {bits}; use a codebook, which "
            "has 1, 2, 3, 4, 6 or 8."
        )
    if zero_point not in get_args(ZeroPoint):
        raise ConfigError(f"--zero-point is '{zero_point}'; it must be none, int or float.")


def _zero_point_bits(zero_point: ZeroPoint, bits: int, scale_bits: int) -> int:
    """Return the bits of one zero point: as the codes if an integer, as the scales if a float."""
    return {"none": 0, "int": bits, "float": scale_bits}[zero_point]


def _largest_divisor(size: int, limit: int = 32) -> int:
    return max(n for n in range(1, limit + 1) if size % n == 0)
