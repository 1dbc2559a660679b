"""A `.mlpackage` of a language model as a runner, without the `.pte` around it.

PackageRunner(Path("models/model-0.mlpackage")).logits([1, 42, 7])
"""

from __future__ import annotations

from pathlib import Path
from typing import final

import torch

from llm_coreml.artifact.description import PAST
from llm_coreml.artifact.mil import Feature
from llm_coreml.config.job import Shapes
from llm_coreml.errors import ArtifactError
from llm_coreml.reference.load import load
from llm_coreml.reference.program.coreml_program import CoreMLProgram
from llm_coreml.reference.program.execution import Execution
from llm_coreml.reference.program.interface import INTERFACE_TYPES
from llm_coreml.runtime.reference import DECLARED, execution_suffix
from llm_coreml.runtime.runner import Runner

_START, _LAST = "start_pos", "last_pos"


@final
class PackageRunner(Runner):
    """The default function of a Core ML model, executed by the reference runtime.

    It takes tokens `[1, S]`, `start_pos` `[1]` and perhaps `last_pos` `[1]`, as the programs of
    exports do, keeps its cache in states, and gives logits `[1, 1 or S, V]` first.

    Args:
        path: The `.mlpackage`.
        execution: Numerics, device and memory.

    Raises:
        ArtifactError: it is damaged, or takes or gives something else.
        ConfigError: the execution asks for what is not there.
    """

    def __init__(self, path: Path, execution: Execution = DECLARED) -> None:
        super().__init__()
        self._program = load(path, execution=execution)
        self.label = "reference runtime" + execution_suffix(execution)
        self._tokens = _tokens_of(self._program, path)
        self._logits = self._program.outputs[0]
        others = {each.name for each in self._program.inputs} - {self._tokens.name}
        if any(name.startswith(PAST) for name in others):
            raise ArtifactError(
                f"'{path}' takes its caches as inputs, which the .pte around it hands on; give "
                "that, or the bundle."
            )
        if _START not in others or others - {_START, _LAST} or len(self._logits.shape) != 3:
            raise ArtifactError(
                f"'{path}' takes {', '.join(sorted(others | {self._tokens.name}))} and gives "
                f"'{self._logits.name}' {list(self._logits.shape)}; a language model takes tokens "
                f"[1, S], {_START} [1] and perhaps {_LAST} [1], and gives logits [1, S, V]."
            )
        self._given = others
        self._types = {each.name: INTERFACE_TYPES[each.dtype] for each in self._program.inputs}
        self.ranged = bool(self._tokens.ranges) and not self._tokens.enumerated
        self.seq_lengths = self._lengths()
        self.every_row = self._logits.shape[1] != 1
        self.vocab_size = self._logits.shape[2]
        self.context = self._positions(path)
        self._clear()

    def _lengths(self) -> tuple[int, ...]:
        if self.ranged:
            first, last = self._tokens.ranges[1]
            return first, first if last is None else last
        return tuple(sorted(shape[1] for shape in self._tokens.enumerated or (self._tokens.shape,)))

    def _positions(self, path: Path) -> int:
        """Return the positions of a context: states have some beyond it, which pads may reach."""
        held = [each.shape[2] for each in self._program.states if len(each.shape) == 4]
        if not held:
            raise ArtifactError(
                f"'{path}' has no states [layers, heads, positions, size] that hold keys and "
                "values, so that nobody knows its context; give the .pte or the bundle."
            )
        beyond = Shapes(max(held), self.seq_lengths, ranged=self.ranged).spare
        return max(held) - beyond if max(held) > beyond else max(held)

    def _forward(self, tokens: torch.Tensor, start_pos: torch.Tensor) -> torch.Tensor:
        given = {self._tokens.name: tokens, _START: start_pos}
        if _LAST in self._given:
            given[_LAST] = start_pos + tokens.shape[1] - 1
        typed = {name: value.to(self._types[name]) for name, value in given.items()}
        return self._program(typed)[self._logits.name].to(torch.float32).cpu()

    def _clear(self) -> None:
        self._program.reset()


def _tokens_of(program: CoreMLProgram, path: Path) -> Feature:
    """Return the input that takes tokens."""
    found = [each for each in program.inputs if len(each.shape) == 2 and "int" in each.dtype]
    if len(found) != 1:
        told = ", ".join(f"{each.name} {list(each.shape)}" for each in program.inputs)
        raise ArtifactError(f"'{path}' takes {told}; a language model takes tokens [1, S].")
    return found[0]
