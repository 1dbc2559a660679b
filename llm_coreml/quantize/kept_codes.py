"""The codes of another export, under scales and tables that are fitted to other weights.

    kept = KeptCodes("base")
    weight = kept.fitted(matrix, scheme)       # the base's codes, and the least squares over them
    weight = kept.like(matrix, scheme)         # the same before the fit

A program does not say which matrix is which, so each is found by its numbers: the matrix of a
fine-tune points where the base's does, and in thousands of dimensions no other one comes near.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torchao.quantization import IntxUnpackedToInt8Tensor

from llm_coreml.artifact.mapped import map_file
from llm_coreml.errors import ArtifactError, ConfigError, UnsupportedError
from llm_coreml.quantize.calibrate.hessian import Alike
from llm_coreml.quantize.calibrate.refit import refit
from llm_coreml.quantize.formats.round import one_row
from llm_coreml.quantize.formats.schemes import IntChannel, IntGroup, Scheme
from llm_coreml.quantize.formats.serialize import from_parts, to_parts
from llm_coreml.quantize.formats.stored import StoredMatrix, stored_matrices

_PROGRAM = "model.pte"
# Rows of a matrix that are compared.
_ROWS = 16
# The least cosine: a matrix of normal numbers and their signs alone have 0.8, two matrices 0.
_ALIKE = 0.5
# Weights fitted at a time, where rows do not depend on each other.
_PIECE = 1 << 24


@dataclass(frozen=True, eq=False)
class _Candidate:
    """A matrix of the program.

    Attributes:
        stored: As the file has it.
        direction: Its compared rows, as one vector of length one.
    """

    stored: StoredMatrix
    direction: torch.Tensor

    def fits(self, scheme: Scheme, shape: tuple[int, int]) -> bool:
        """Return whether it is stored as `scheme` says."""
        wanted = "none"
        if isinstance(scheme, (IntGroup, IntChannel)):
            wanted, scheme = scheme.zero_point, replace(scheme, zero_point="none")
        # Integer ones that are all zero are not in a program.
        found = self.stored.zero_point
        same = found == wanted or (found, wanted) == ("none", "int")
        return same and self.stored.stored_bits == scheme.stored_bits(shape)


class KeptCodes:
    """The quantized matrices of an export, found by what they look like.

    Args:
        base: The export's folder, or its program.

    Raises:
        ArtifactError: the program is damaged, or compiled.
        ConfigError: there is none, or none with codes.
        UnsupportedError: it is for systems before iOS18.
    """

    def __init__(self, base: str | Path) -> None:
        self._name = str(base)
        self.sha256 = kept_program(base)
        self._found: defaultdict[tuple[int, int], list[_Candidate]] = defaultdict(list)
        try:
            for stored in stored_matrices(_program(base)):
                weight = stored.tensor()
                rows, columns = weight.shape
                self._found[rows, columns].append(_Candidate(stored, _direction(weight)))
        except (ArtifactError, UnsupportedError) as error:
            raise type(error)(f"--codes-of '{base}': {error}") from None
        if not self._found:
            raise ConfigError(
                f"--codes-of '{base}': its program has no codes that could be kept; give an "
                "export for Core ML with quantized weights."
            )

    def like(self, target: torch.Tensor, scheme: Scheme) -> torch.Tensor:
        """Return the base's matrix that `target` was tuned from, with the base's values.

        Args:
            target: `[rows, columns]`, any float type.
            scheme: How it is stored.

        Raises:
            UnsupportedError: the base has none that is like it, or stores it in another way.
        """
        rows, columns = target.shape
        same = self._found.get((rows, columns), [])
        stored = [each for each in same if each.fits(scheme, (rows, columns))]
        if not stored:
            told = f"none as {scheme.label}" if same else "none of that shape"
            raise UnsupportedError(
                f"--codes-of '{self._name}' has {told}; export with the base's own settings "
                "(--plan takes its manifest.json), and without cuts of matrices."
            )
        wanted = _direction(target)
        cosines = [float(each.direction @ wanted) for each in stored]
        best = max(range(len(stored)), key=lambda at: cosines[at])
        if not cosines[best] >= _ALIKE:
            raise UnsupportedError(
                f"--codes-of '{self._name}' has nothing like it (the nearest matrix has a cosine "
                f"of {cosines[best]:.2f}); give an export of the model that this one was tuned "
                "from, or leave the codes to be chosen."
            )
        return stored[best].stored.tensor()

    def fitted(self, target: torch.Tensor, scheme: Scheme) -> torch.Tensor:
        """Return the same with scales or tables whose weights are nearest to `target`.

        Raises:
            UnsupportedError: see `like`.
        """
        weight, even = self.like(target, scheme), Alike(target.shape[1])
        if not isinstance(weight, IntxUnpackedToInt8Tensor):
            return refit(weight, target.to(torch.float32), even)
        step = max(1, _PIECE // target.shape[1])
        made = [
            to_parts(refit(weight[at : at + step], part.to(torch.float32), even))
            for at, part in zip(range(0, len(target), step), torch.split(target, step), strict=True)
        ]
        return from_parts(made[0][0], lambda name: torch.cat([parts[name] for _, parts in made]))


def kept_program(base: str | Path) -> str:
    """Return the SHA-256 of an export's program. Raises ConfigError where there is none."""
    try:
        return hashlib.sha256(map_file(_program(base))).hexdigest()
    except ArtifactError as error:
        raise ConfigError(
            f"--codes-of '{base}': {error} Give an export's folder, or its {_PROGRAM}."
        ) from None


def _program(base: str | Path) -> Path:
    path = Path(base)
    return path / _PROGRAM if path.is_dir() else path


def _direction(weight: torch.Tensor) -> torch.Tensor:
    rows = torch.linspace(0, len(weight) - 1, min(_ROWS, len(weight))).long().tolist()
    found = torch.cat([one_row(weight, row) for row in rows]).flatten()
    direction: torch.Tensor = found / found.norm().clamp(min=torch.finfo(torch.float32).tiny)
    return direction
