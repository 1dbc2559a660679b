"""The Core ML program inside a `.pte` as a runner, on any machine.

ReferenceRunner(folder / "model.pte").logits([1, 42, 7])
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import final

import torch

from llm_coreml.errors import ArtifactError
from llm_coreml.reference.load import load_method
from llm_coreml.reference.program.constants import PackedWeight
from llm_coreml.reference.program.execution import Execution
from llm_coreml.runtime.runner import Runner

# What a device is meant to compute, on any machine.
DECLARED = Execution()


@final
class ReferenceRunner(Runner):
    """The Core ML program inside a `.pte`, executed by the reference runtime.

    Args:
        path: The `.pte`.
        execution: Numerics, device and memory.

    Attributes:
        program: The Core ML program, for observers.

    Raises:
        ArtifactError: the file is damaged, or its method has another signature than an LLM's.
        ConfigError: the execution asks for what is not there.
    """

    def __init__(self, path: Path, execution: Execution = DECLARED) -> None:
        super().__init__()
        self._method = load_method(path, execution=execution)
        self.label = "reference runtime" + execution_suffix(execution)
        signature = [(spec.dtype, len(spec.shape)) for spec in self._method.inputs]
        if signature != [("int64", 2), ("int64", 1)] or len(self._method.programs) != 1:
            raise ArtifactError(
                f"Method 'forward' of '{path}' takes {signature}; a language model takes tokens "
                "int64 [1, S] and start_pos int64 [1]."
            )
        self.program, constants = self._method.programs[0], self._method.constants
        tokens = [feature for feature in self.program.inputs if len(feature.shape) == 2]
        given = [len(spec.shape) for spec in self._method.outputs]
        if len(tokens) != 1 or given != [3]:
            raise ArtifactError(
                f"Method 'forward' of '{path}' gives outputs of {given} axes; a language model "
                "gives logits [1, S, V] for tokens [1, S]."
            )
        shapes = tokens[0].enumerated or (tokens[0].shape,)
        self.seq_lengths = tuple(sorted(shape[1] for shape in shapes))
        _, rows, self.vocab_size = self._method.outputs[0].shape
        self.every_row = rows != 1
        self.context = _constant(constants, "get_max_context_len", path)

    def constants(self) -> Iterator[tuple[str, torch.Tensor | PackedWeight]]:
        """Yield the program's constants, see `CoreMLProgram.constants`."""
        return self._method.programs[0].constants()

    def _forward(self, tokens: torch.Tensor, start_pos: torch.Tensor) -> torch.Tensor:
        return self._method(tokens, start_pos).cpu()

    def _clear(self) -> None:
        self._method.reset()


def execution_suffix(execution: Execution) -> str:
    """Return what is not usual about an execution, such as ` (fp32, cuda)`."""
    mode = "" if execution.mode == DECLARED.mode else execution.mode
    device = "" if execution.device == DECLARED.device else execution.device
    told = [word for word in (mode, device, "compiled" if execution.compiled else "") if word]
    return f" ({', '.join(told)})" if told else ""


def _constant(constants: Mapping[str, object], name: str, path: Path) -> int:
    value = constants.get(name)
    if not isinstance(value, int):
        raise ArtifactError(f"'{path}' has no constant method {name}; it is no export of an LLM.")
    return value
