"""A `.pte` on ExecuTorch's own runtime, as a runner."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, final

import torch

from llm_coreml.artifact.description import Description
from llm_coreml.artifact.pte import constant_methods
from llm_coreml.runtime.runner import Runner


@final
class ExecutorchRunner(Runner):
    """A `.pte` on ExecuTorch's own runtime; on Linux the XNNPACK twin.

    Args:
        path: The `.pte`.
        description: What it offers.

    Raises:
        ArtifactError: the container is damaged, contradicts its description, or several of its
            methods have states.
    """

    def __init__(self, path: Path, description: Description) -> None:
        super().__init__()
        description.check_one_sequence()
        # ExecuTorch trusts offsets and lengths; this reader has checked them all.
        description.check_constants(constant_methods(path), path)
        from executorch.runtime import Runtime, Verification

        self._load: Callable[[], Any] = lambda: Runtime.get().load_program(
            path, verification=Verification.Minimal
        )
        self.label = "XNNPACK on CPU"
        self._description = description
        self.seq_lengths = description.seq_lengths
        self.every_row = description.every_row
        self.rewinds = description.rewinds
        self._clear()
        self.context = self._constant("get_max_context_len")
        self.vocab_size = self._constant("get_vocab_size")

    def _constant(self, name: str) -> int:
        return int(self._program.load_method(name).execute([])[0])

    def _forward(self, tokens: torch.Tensor, start_pos: torch.Tensor) -> torch.Tensor:
        method = self._methods[self._description.method_for(tokens.shape[1])]
        logits: torch.Tensor = method.execute([tokens, start_pos])[0]
        return logits.clone()

    def _clear(self) -> None:
        # The cache lives in the loaded methods and nothing resets it but loading them again.
        self._program = self._load()
        self._methods = {
            name: self._program.load_method(name) for name in self._description.methods
        }
