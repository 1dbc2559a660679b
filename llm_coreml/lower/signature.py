"""What a Core ML program takes and gives, as data: names, element types and sizes, in order.

    signature = Signature(
        takes=("tokens int32 [1, P]", "start_pos int32 [1]"),
        gives=("logits float32 [1, 1, 32000]",),
    )
    signature.results((tokens, start_pos))       # empty tensors of the sizes that follow

A size is a number, or the name of one that an input has.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

_PORT = re.compile(r"(?P<name>\w+) (?P<dtype>\w+) \[(?P<sizes>[\w, ]*)\]")
_DTYPES = {
    "float16": torch.float16,
    "float32": torch.float32,
    "int32": torch.int32,
    "uint8": torch.uint8,
}


@dataclass(frozen=True)
class Port:
    """An input or output.

    Attributes:
        name: As the program calls it.
        dtype: In the method, between which and the program's own Core ML's delegate converts.
        sizes: Of its dimensions, or the names of those.
    """

    name: str
    dtype: torch.dtype
    sizes: tuple[int | str, ...]

    @classmethod
    def of(cls, text: str) -> Port:
        """Return what a text such as `tokens int32 [1, P]` says.

        Raises:
            ValueError: it is no such text.
        """
        found = _PORT.fullmatch(text)
        if found is None or found["dtype"] not in _DTYPES:
            raise ValueError(f"'{text}' is no name, element type and sizes")
        sizes = [size.strip() for size in found["sizes"].split(",")] if found["sizes"] else []
        return cls(
            found["name"],
            _DTYPES[found["dtype"]],
            tuple(int(size) if size.isdecimal() else size for size in sizes),
        )

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.name} {dtype} [{', '.join(map(str, self.sizes))}]"


def empty(texts: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """Return zeros by name, of the types and sizes that texts such as `float16 [2, 8]` say."""
    ports = [Port.of(f"{name} {text}") for name, text in texts.items()]
    return {
        port.name: torch.zeros([int(size) for size in port.sizes], dtype=port.dtype)
        for port in ports
    }


@dataclass(frozen=True)
class Signature:
    """The inputs and outputs of a Core ML program, in the order in which a method passes them.

    Attributes:
        takes: The inputs, each as `Port.of` reads it.
        gives: The outputs.

    Raises:
        ValueError: one is no port, two have a name, or an output has a size that no input has.
    """

    takes: tuple[str, ...]
    gives: tuple[str, ...]

    def __post_init__(self) -> None:
        for ports in (self.inputs, self.outputs):
            names = [port.name for port in ports]
            if len(set(names)) < len(names):
                raise ValueError(f"two of {names} have the same name")
        known = {size for port in self.inputs for size in port.sizes}
        unknown = [
            size
            for port in self.outputs
            for size in port.sizes
            if isinstance(size, str) and size not in known
        ]
        if unknown:
            raise ValueError(f"no input has the size {unknown[0]}")

    @classmethod
    def of(cls, text: str) -> Signature:
        """Return the signature whose text, as `str` gives it, this is."""
        takes, gives = (tuple(part.split("; ")) for part in text.split(" -> "))
        return cls(takes, gives)

    def __str__(self) -> str:
        return " -> ".join("; ".join(part) for part in (self.takes, self.gives))

    @property
    def inputs(self) -> tuple[Port, ...]:
        """The inputs."""
        return tuple(map(Port.of, self.takes))

    @property
    def outputs(self) -> tuple[Port, ...]:
        """The outputs."""
        return tuple(map(Port.of, self.gives))

    def results(self, given: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return tensors, whatever they hold, of the types and sizes that the program gives.

        Args:
            given: The inputs; sizes may be symbols.

        Raises:
            TypeError: an input has another element type, or other dimensions.
        """
        sizes: dict[str, Any] = {}
        for port, tensor in zip(self.inputs, given, strict=True):
            if tensor.dtype != port.dtype or tensor.dim() != len(port.sizes):
                raise TypeError(f"{port} is given {tensor.dtype} {list(tensor.shape)}")
            for size, found in zip(port.sizes, tensor.shape, strict=True):
                if isinstance(size, str):
                    sizes.setdefault(size, found)
        return [
            given[0].new_empty(
                [sizes[size] if isinstance(size, str) else size for size in port.sizes],
                dtype=port.dtype,
            )
            for port in self.outputs
        ]
