"""A `.pte` on ExecuTorch's own runtime, as a runner."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, final

import torch

from llm_coreml.runtime.runner import Runner


@final
class ExecutorchRunner(Runner):
    """A `.pte` on ExecuTorch's own runtime; on Linux the XNNPACK twin."""

    def __init__(self, path: Path, seq_lengths: tuple[int, ...]) -> None:
        super().__init__()
        from executorch.runtime import Runtime, Verification

        self._load: Callable[[], Any] = lambda: Runtime.get().load_program(
            path, verification=Verification.Minimal
        )
        self.label = "XNNPACK on CPU"
        self.seq_lengths = seq_lengths
        self._clear()
        self.context = self._constant("get_max_context_len")
        self.vocab_size = self._constant("get_vocab_size")
        self.every_row = False

    def _constant(self, name: str) -> int:
        return int(self._program.load_method(name).execute([])[0])

    def _forward(self, tokens: torch.Tensor, start_pos: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self._method.execute([tokens, start_pos])[0]
        return logits.clone()

    def _clear(self) -> None:
        # The cache lives in the loaded method and nothing resets it but loading it again.
        self._program = self._load()
        self._method = self._program.load_method("forward")
