"""A checkpoint of quantized matrices, seen as any other: each under the name of its weight.

checkpoint = PackedCheckpoint(files, formats)
checkpoint.shape("model.layers.0.mlp.up_proj.weight")   # the matrix's own
checkpoint.packed("model.layers.0.mlp.up_proj.weight")  # None if it is no such
checkpoint.tensor(name, torch.float32)  # its values, by the format's definition
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import final

import torch

from llm_coreml.checkpoint.checkpoint import Checkpoint, listing
from llm_coreml.checkpoint.matrix import Levels, Packed, PackedForm, fit
from llm_coreml.checkpoint.over_files import CheckpointOver
from llm_coreml.checkpoint.packed.parts import PackedFormat, Parts

_WEIGHT = "weight"


@final
@dataclass(frozen=True, eq=False)
class PackedCheckpoint(CheckpointOver):
    """Files that hold quantized matrices; see `Checkpoint`.

    Attributes:
        files: The tensors as they are stored.
        formats: What the matrices may be stored as; the first that finds all its parts is taken.
            None of them: nothing is quantized, whatever config.json says.
        as_values: Matrices are not given as codes, so that they are quantized as any others.
    """

    files: Checkpoint = field(repr=False)
    formats: tuple[PackedFormat, ...]
    as_values: bool = False

    @property
    def notes(self) -> tuple[str, ...]:  # type: ignore[override]
        """Return what is to know of how the files are read, and what is left out."""
        notes = list(self.files.notes)
        if not self.formats:
            notes.append(
                "config.json speaks of quantized weights, but no tensor is quantized: that is left "
                "over, and the weights are read as they are."
            )
        beside = sorted(self._beside)
        if beside:
            notes.append(
                f"{len(beside)} tensors are left out, which quantize activations: "
                f"{listing(beside, limit=2)}. Activations are not quantized."
            )
        return tuple(notes)

    def names(self) -> frozenset[str]:
        """Return the names of all tensors, a quantized matrix under that of its weight."""
        names = set(self.files.names()) - self._beside
        for weight, (form, parts) in self._matrices.items():
            names -= {f"{parts.module}.{part}" for part in (*form.suffixes, *form.optional)}
            names.add(weight)
        return frozenset(names)

    def tied(self) -> dict[str, str]:
        """Return what the files tie."""
        return self.files.tied()

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of `name`, from headers."""
        if name not in self._matrices:
            return self.files.shape(name)
        form, parts = self._matrices[name]
        return form.shape(parts)

    def dtype(self, name: str) -> torch.dtype:
        """Return the type of `name`: a quantized matrix is computed to fp32."""
        return torch.float32 if name in self._matrices else self.files.dtype(name)

    def where(self, name: str) -> str:
        """Return the file that holds `name`."""
        if name not in self._matrices:
            return self.files.where(name)
        form, parts = self._matrices[name]
        return self.files.where(f"{parts.module}.{form.suffixes[0]}")

    def stored(self, name: str) -> torch.Tensor:
        """Return `name`; a quantized matrix as what its codes stand for, rounded to fp32."""
        if name not in self._matrices:
            return self.files.stored(name)
        form, parts = self._matrices[name]
        return form.values(parts)

    def contents(self, name: str) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the stored tensors that make up `name`."""
        if name not in self._matrices:
            yield from self.files.contents(name)
            return
        form, parts = self._matrices[name]
        for part in sorted((*form.suffixes, *form.optional)):
            if part in parts:
                yield from self.files.contents(f"{parts.module}.{part}")

    def quantized(self) -> Mapping[str, str]:
        """Return the label of each quantized matrix' format, by name."""
        return MappingProxyType({name: form.label for name, (form, _) in self._matrices.items()})

    def forms(self) -> Mapping[str, PackedForm]:
        """Return how each quantized matrix is stored; reads all scales at the first call."""
        return MappingProxyType({}) if self.as_values else self._forms

    def packed(self, name: str) -> Packed | None:
        """Return the codes and levels of a quantized matrix, None for any other tensor."""
        if self.as_values or name not in self._matrices:
            return None
        form, parts = self._matrices[name]
        levels, codes = _levels(form, parts), form.codes(parts)
        if bool(levels.flat.any()):
            size = codes.shape[1] // levels.flat.shape[1]
            codes = codes.masked_fill(levels.flat.repeat_interleave(size, dim=1), 0)
        return Packed(codes.contiguous(), levels, form.order(parts))

    @cached_property
    def _beside(self) -> frozenset[str]:
        found = {
            f"{parts.module}.{part}"
            for form, parts in self._matrices.values()
            for part in form.beside
            if part in parts
        }
        return frozenset(found)

    @cached_property
    def _matrices(self) -> dict[str, tuple[PackedFormat, Parts]]:
        names = self.files.names()
        found: dict[str, tuple[PackedFormat, Parts]] = {}
        for form in self.formats:
            for name in sorted(names):
                module, _, suffix = name.rpartition(".")
                weight = f"{module}.{_WEIGHT}"
                complete = all(f"{module}.{part}" in names for part in form.suffixes)
                parts = Parts(self.files, module)
                if (
                    suffix == form.suffixes[0]
                    and complete
                    and weight not in found
                    and form.holds(parts)
                ):
                    found[weight] = (form, parts)
        return found

    @cached_property
    def _forms(self) -> dict[str, PackedForm]:
        found = {}
        for name, (form, parts) in self._matrices.items():
            levels = _levels(form, parts)
            columns, groups = form.shape(parts)[1], levels.scale.shape[1]
            table = levels.entries is not None
            size = columns // groups if groups > 1 or table else None
            block = None if levels.tables is None else _block(form.shape(parts), levels.tables)
            found[name] = PackedForm(
                form.label, levels.bits, size, levels.kind, levels.error, table, block
            )
        return found


def _block(shape: tuple[int, int], tables: torch.Tensor) -> tuple[int | None, int | None]:
    """Return how many rows and columns share one of `tables`, None for all."""
    rows, columns = (
        None if groups == 1 else count // groups
        for count, groups in zip(shape, tables.shape, strict=False)
    )
    return rows, columns


def _levels(form: PackedFormat, parts: Parts) -> Levels:
    try:
        return fit(form.scales(parts))
    except ValueError as error:
        raise parts.error(str(error)) from error
