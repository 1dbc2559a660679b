"""How a module's matrices hang together, and how a pass is halted before them.

    block.wiring.shared           # (("self_attn.q_proj", "self_attn.k_proj", ...), ...)
    y = run(block.steps(x, chunk))

A module declares what its matrices read and write, and computes in steps: it halts wherever
matrices read. Who calibrates, rotates or imports asks the declaration and goes by these steps, and
knows no module by name.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import torch

# What a matrix may read or write: the residual stream, or the values of each key/value head.
Space = Literal["residual", "heads"]

# Computes what the matrices of a stage get. Only the halt holds what it is computed from: who goes
# on with the result and drops the halt has freed that.
Halt = Callable[[], torch.Tensor]
# Yields a halt for every stage, is sent what that gives, and returns what the module gives.
Steps = Generator[Halt, torch.Tensor, torch.Tensor]
_Given = TypeVar("_Given")


def run(steps: Generator[Halt, torch.Tensor, _Given]) -> _Given:
    """Go through all steps, computing what is read at each halt once."""
    try:
        halt = next(steps)
        while True:
            halt = steps.send(halt())
    except StopIteration as done:
        result: _Given = done.value
        return result


@dataclass(frozen=True)
class Matrix:
    """What lies on the two sides of a matrix.

    Attributes:
        name: Of its module, within the one that declares it.
        reads: The space that its inputs are of, None if it is known to its neighbours only.
        writes: The space of its outputs.
        norm: The module whose gain its inputs have been multiplied by, if they come from a norm.
    """

    name: str
    reads: Space | None = None
    writes: Space | None = None
    norm: str | None = None


@dataclass(frozen=True)
class Wiring:
    """The matrices of a module.

    Attributes:
        stages: In the order in which they are computed; those of a stage get the same inputs.
        inner: Modules with other parameters, which touch no space: norms of queries, for example;
            "" is the module that declares it.
    """

    stages: tuple[tuple[Matrix, ...], ...]
    inner: tuple[str, ...] = ()

    @property
    def shared(self) -> tuple[tuple[str, ...], ...]:
        """The names of the matrices of every stage."""
        return tuple(tuple(matrix.name for matrix in stage) for stage in self.stages)

    @property
    def matrices(self) -> dict[str, Matrix]:
        """All matrices by name."""
        return {matrix.name: matrix for stage in self.stages for matrix in stage}

    def first_of(self, name: str) -> str:
        """Return the first of the matrices that get the same inputs as `name`."""
        return next(stage[0] for stage in self.shared if name in stage)

    @property
    def norms(self) -> frozenset[str]:
        """The norms behind which matrices read."""
        found = (matrix.norm for matrix in self.matrices.values())
        return frozenset(norm for norm in found if norm is not None)

    def inside(self, prefix: str) -> Wiring:
        """Return the same with names as the module around has them: `prefix` and a dot before."""

        def renamed(matrix: Matrix) -> Matrix:
            norm = None if matrix.norm is None else f"{prefix}.{matrix.norm}"
            return replace(matrix, name=f"{prefix}.{matrix.name}", norm=norm)

        stages = tuple(tuple(map(renamed, stage)) for stage in self.stages)
        inner = tuple(f"{prefix}.{name}" if name else prefix for name in self.inner)
        return Wiring(stages, inner)

    def behind(self, norm: str | None) -> Wiring:
        """Return the same where what is read of the residual stream has passed a norm."""
        stages = tuple(
            tuple(replace(m, norm=norm) if m.reads == "residual" else m for m in stage)
            for stage in self.stages
        )
        return replace(self, stages=stages)


def joined(*parts: Wiring) -> Wiring:
    """Return the wiring of modules that are computed one after the other."""
    return Wiring(
        tuple(stage for part in parts for stage in part.stages),
        tuple(name for part in parts for name in part.inner),
    )
