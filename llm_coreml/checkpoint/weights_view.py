"""A model's weights under the decoder's own names, whatever a checkpoint calls them.

    weights = FamilyWeights(checkpoint, family.stored(spec))
    weights.tensor("layers.0.mlp.up_proj.weight", torch.float16)
    weights.packed("layers.0.mlp.up_proj.weight")          # None if it is not quantized

A family says of each parameter which stored tensors it is made of, and how: `Stored`. Several may
be parts of one stored tensor, and one may be put together from several. Whoever quantizes knows of
this view alone; a rotation is another view of the same kind.
"""

from __future__ import annotations

import abc
import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import final

import torch

from llm_coreml.checkpoint.checkpoint import Checkpoint, cast_checked, listing
from llm_coreml.checkpoint.matrix import Packed, PackedForm
from llm_coreml.checkpoint.value_maps import ValueMap
from llm_coreml.errors import CheckpointError, UnsupportedError

Shape = tuple[int, ...]


@final
@dataclass(frozen=True)
class Stored:
    """What one parameter of the decoder is made of.

    Attributes:
        names: The checkpoint's tensors, in the order that `values` takes them; there may be none.
        values: How they become the parameter; None takes the only one as it is.
    """

    names: tuple[str, ...]
    values: ValueMap | None = None


class Weights(abc.ABC):
    """The parameters of a decoder, read one at a time by the decoder's names."""

    @abc.abstractmethod
    def names(self) -> frozenset[str]:
        """Return the names of all parameters."""

    @abc.abstractmethod
    def dtype(self, name: str) -> torch.dtype:
        """Return the type in which `name` is stored, without reading its data."""

    @abc.abstractmethod
    def described(self, name: str) -> str:
        """Return what a message calls `name`: the stored tensor and its file."""

    @abc.abstractmethod
    def tensor(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """Read one parameter.

        Args:
            name: One of `names`.
            dtype: bfloat16, float16 or float32.

        Returns:
            A contiguous CPU tensor that the caller may write to.

        Raises:
            CheckpointError: it cannot be read, is not finite, or does not fit `dtype`.
        """

    @abc.abstractmethod
    def sha256(self, names: Collection[str]) -> str:
        """Return a hash of everything that the parameters `names` follow from."""

    @abc.abstractmethod
    def forms(self) -> Mapping[str, PackedForm]:
        """Return how each parameter that is quantized already is stored. Raises CheckpointError."""

    @abc.abstractmethod
    def packed(self, name: str) -> Packed | None:
        """Return a matrix that is quantized already as codes and levels, else None."""


@final
class FamilyWeights(Weights):
    """The weights of a checkpoint, as its family names and arranges them.

    Args:
        checkpoint: Where they are.
        stored: What each parameter is made of.
    """

    def __init__(self, checkpoint: Checkpoint, stored: Mapping[str, Stored]) -> None:
        self._checkpoint = checkpoint
        self._stored = stored

    def names(self) -> frozenset[str]:
        """Return the names of all parameters."""
        return frozenset(self._stored)

    def dtype(self, name: str) -> torch.dtype:
        """Return the type of the first tensor that `name` is made of; fp32 if it is of none."""
        names = self._stored[name].names
        return self._checkpoint.dtype(names[0]) if names else torch.float32

    def described(self, name: str) -> str:
        """Return the stored tensors of `name` with the file of the first."""
        names = self._stored[name].names
        if not names:
            return f"'{name}', which is computed"
        shown = listing([f"'{stored}'" for stored in names], limit=3)
        return f"{shown} in {self._checkpoint.where(names[0])}"

    def tensor(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """Read the stored tensors of `name`, and arrange them."""
        stored = self._stored[name]
        if stored.values is None:
            return self._checkpoint.tensor(stored.names[0], dtype)
        parts = [self._checkpoint.tensor(each, torch.float32) for each in stored.names]
        return cast_checked(stored.values.values(parts), dtype, self.described(name))

    def sha256(self, names: Collection[str]) -> str:
        """Return a hash of stored tensors, and of what is made of them."""
        made = [[name, self._stored[name].names, repr(self._stored[name].values)] for name in names]
        tensors = {each for name in names for each in self._stored[name].names}
        facts = json.dumps([sorted(made), self._checkpoint.sha256(tensors)])
        return hashlib.sha256(facts.encode()).hexdigest()

    def forms(self) -> Mapping[str, PackedForm]:
        """Return the forms of quantized matrices; raises UnsupportedError where one is rearranged.

        A part of the rows of a matrix is stored as the whole is.
        """
        forms, found = self._checkpoint.forms(), {}
        for name, stored in self._stored.items():
            held = [each for each in stored.names if each in forms]
            if held and stored.values is not None and not stored.values.keeps_codes:
                raise UnsupportedError(
                    f"{self.described(name)} is quantized already, and this family rearranges it, "
                    "which cannot be imported; give the unquantized checkpoint."
                )
            if held:
                found[name] = forms[held[0]]
        return MappingProxyType(found)

    def packed(self, name: str) -> Packed | None:
        """Return codes and levels of `name`, None where it is not quantized."""
        stored = self._stored[name]
        packed = self._checkpoint.packed(stored.names[0]) if stored.names else None
        if packed is None or stored.values is None:
            return packed
        return stored.values.packed(packed)


def expected_tensors(stored: Mapping[str, Stored], shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    """Return the tensors that a checkpoint must hold, with their shapes.

    Args:
        stored: What each parameter is made of.
        shapes: The shape of each parameter.

    Raises:
        CheckpointError: two parameters want one tensor in different shapes.
    """
    expected: dict[str, Shape] = {}
    for name, made in stored.items():
        shape = shapes[name]
        sources: Sequence[Shape] = [shape] if made.values is None else made.values.sources(shape)
        for each, wanted in zip(made.names, sources, strict=True):
            if expected.setdefault(each, wanted) != wanted:
                raise CheckpointError(
                    f"config.json gives sizes that ask for '{each}' as {list(expected[each])} and "
                    f"as {list(wanted)}; use config.json and weights of one and the same model."
                )
    return expected
