"""A `.pte` on ExecuTorch's own runtime, as a runner."""

from __future__ import annotations

from pathlib import Path
from typing import final

import torch

from llm_coreml.artifact.description import Description
from llm_coreml.artifact.pte import constant_methods
from llm_coreml.errors import ArtifactError
from llm_coreml.runtime.executorch_apart import Apart
from llm_coreml.runtime.executorch_engine import Engine, Here
from llm_coreml.runtime.runner import Runner


@final
class ExecutorchRunner(Runner):
    """A `.pte` on ExecuTorch's own runtime; on Linux the XNNPACK twin.

    Args:
        path: The `.pte`.
        description: What it offers.
        apart: This process has not made the file, so it is run in one of its own: ExecuTorch and
            XNNPACK trust what stands in it.
        label: What computes.

    Raises:
        ArtifactError: the container is damaged, contradicts its description, or several of its
            methods have states.
    """

    def __init__(
        self,
        path: Path,
        description: Description,
        apart: bool = False,
        label: str = "XNNPACK on CPU",
    ) -> None:
        super().__init__()
        description.check_one_sequence()
        # ExecuTorch trusts offsets and lengths; this reader has checked them all.
        description.check_constants(constant_methods(path), path)
        self.label = label
        self._description = description
        self.seq_lengths = description.seq_lengths
        self.ranged = description.ranged
        self.every_row = description.every_row
        self.rewinds = description.rewinds
        self.context = self._constant("get_max_context_len")
        self.vocab_size = self._constant("get_vocab_size")
        self._engine: Engine = (
            Apart(path, description) if apart else Here(path, tuple(description.methods))
        )
        self._clear()

    def _constant(self, name: str) -> int:
        value = self._description.constant_methods.get(name)
        if not isinstance(value, int) or value < 1:
            raise ArtifactError(f"The program's {name} is {value}; export it again.")
        return value

    def _forward(self, tokens: torch.Tensor, start_pos: torch.Tensor) -> torch.Tensor:
        length = tokens.shape[1]
        shape = (1, length if self.every_row else 1, self.vocab_size)
        return self._engine.run(self._description.method_for(length), tokens, start_pos, shape)

    def _clear(self) -> None:
        self._engine.load()
