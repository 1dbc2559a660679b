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

from llm_coreml.errors import ConfigError, UnsupportedError

CODEBOOK_BITS = (1, 2, 3, 4, 6, 8)


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

    def stored_bits(self, shape: tuple[int, int]) -> int:
        """Bits of a whole matrix of `shape`, scales and tables included."""
        return self.bits * shape[0] * shape[1] + self.overhead_bits(shape)

    def bits_per_weight(self, shape: tuple[int, int]) -> float:
        """Bits per weight including scales and tables."""
        return self.bits + self.overhead_bits(shape) / (shape[0] * shape[1])


@dataclass(frozen=True)
class IntGroup(Scheme):
    """Symmetric int4, one scale of `scale_bits` per `group_size` consecutive inputs of a row."""

    bits: int = 4
    group_size: int = 32
    scale_bits: int = 16

    def __post_init__(self) -> None:
        if self.group_size < 1:
            raise ConfigError(f"--group-size is {self.group_size}; it must be at least 1.")

    name = "int4-group"

    @property
    def label(self) -> str:
        return f"int4 group {self.group_size}"

    def check(self, tensor: str, shape: tuple[int, int]) -> None:
        if shape[1] % self.group_size:
            raise UnsupportedError(
                f"{tensor} has {shape[1]} inputs, which --group-size {self.group_size} does not "
                f"divide; use a group size that does, such as {_largest_divisor(shape[1])}, "
                "or int4-channel, which has no groups."
            )

    def overhead_bits(self, shape: tuple[int, int]) -> int:
        return self.scale_bits * shape[0] * (shape[1] // self.group_size)


@dataclass(frozen=True)
class IntChannel(Scheme):
    """Symmetric int4 or int8, one scale of `scale_bits` per output row."""

    bits: int = 8
    scale_bits: int = 16

    @property
    def name(self) -> str:
        return f"int{self.bits}-channel"

    @property
    def label(self) -> str:
        return f"int{self.bits} per channel"

    def check(self, tensor: str, shape: tuple[int, int]) -> None:
        """Any shape fits."""

    def overhead_bits(self, shape: tuple[int, int]) -> int:
        return self.scale_bits * shape[0]


@dataclass(frozen=True)
class Codebook(Scheme):
    """Codes into tables of 2^bits values of `scale_bits`, one table per `rows` output rows."""

    bits: int = 4
    rows: int = 16
    scale_bits: int = 16

    def __post_init__(self) -> None:
        if self.rows < 1:
            raise ConfigError(f"--codebook-rows is {self.rows}; it must be at least 1.")

    name = "codebook"

    @property
    def label(self) -> str:
        return f"codebook {self.bits} bit, {self.rows} rows per table"

    def check(self, tensor: str, shape: tuple[int, int]) -> None:
        if shape[0] % self.rows:
            raise UnsupportedError(
                f"{tensor} has {shape[0]} rows, which --codebook-rows {self.rows} does not divide; "
                f"use a number that does, such as {_largest_divisor(shape[0], 16)}."
            )

    def overhead_bits(self, shape: tuple[int, int]) -> int:
        return int(self.scale_bits * 2**self.bits * (shape[0] // self.rows))


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
        "int8-channel": "int8, one scale per output row; every target",
        "codebook": "1, 2, 3, 4, 6 or 8 bit tables, one per --codebook-rows; every target",
        "none": "weights as they are, fp16 or fp32",
    }
)


def _largest_divisor(size: int, limit: int = 32) -> int:
    return max(n for n in range(1, limit + 1) if size % n == 0)
