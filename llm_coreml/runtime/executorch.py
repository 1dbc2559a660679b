"""A `.pte` on ExecuTorch's own runtime, as a runner."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, final

import torch

from llm_coreml.artifact.description import Description
from llm_coreml.artifact.limits import reason
from llm_coreml.artifact.pte import constant_methods
from llm_coreml.errors import ArtifactError
from llm_coreml.runtime.runner import Runner


class Engine(ABC):
    """ExecuTorch's runtime, here or in another process, with one program.

    Its methods raise ArtifactError where the program cannot be run.
    """

    @abstractmethod
    def load(self) -> None:
        """Load the program's methods, again if they are loaded: nothing else empties a cache."""

    @abstractmethod
    def run(
        self, method: str, tokens: torch.Tensor, start_pos: torch.Tensor, shape: Sequence[int]
    ) -> torch.Tensor:
        """Call a method: int64 `[1, S]`, int64 `[1]` -> float32 of `shape`, as is to be checked."""


@final
class Here(Engine):
    """ExecuTorch's runtime in this process, which a damaged program can crash.

    Args:
        path: The `.pte`.
        methods: Those that read tokens.
    """

    def __init__(self, path: Path, methods: Sequence[str]) -> None:
        from executorch.runtime import Runtime

        self._runtime = Runtime.get()
        self._path, self._names = path, methods
        self._methods: dict[str, Any] = {}

    def load(self) -> None:
        """Load the program's methods."""
        from executorch.runtime import Verification

        with self._told():
            program = self._runtime.load_program(self._path, verification=Verification.Minimal)
            self._methods = {name: program.load_method(name) for name in self._names}
        missing = [name for name, method in self._methods.items() if method is None]
        if missing:
            raise ArtifactError(f"'{self._path}' has no method '{missing[0]}'; export again.")

    def run(
        self, method: str, tokens: torch.Tensor, start_pos: torch.Tensor, shape: Sequence[int]
    ) -> torch.Tensor:
        """Call a method."""
        with self._told():
            results = self._methods[method].execute([tokens, start_pos])
        logits = results[0] if results else None
        if not isinstance(logits, torch.Tensor) or logits.dtype != torch.float32:
            raise ArtifactError(f"'{self._path}' gives no float32 logits; export again.")
        if list(logits.shape) != list(shape):
            raise ArtifactError(
                f"'{self._path}' gives logits of shape {list(logits.shape)}, not {list(shape)}; "
                "export again."
            )
        return logits.clone()

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, ValueError, MemoryError) as error:
            raise ArtifactError(
                f"ExecuTorch cannot run '{self._path}': {reason(error)}. Export it again, or copy "
                "it again if it was transferred."
            ) from None


@final
class ExecutorchRunner(Runner):
    """A `.pte` on ExecuTorch's own runtime; on Linux the XNNPACK twin.

    Args:
        path: The `.pte`.
        description: What it offers.
        apart: Nobody vouches for the file, so it is run in a process of its own: ExecuTorch and
            XNNPACK trust what stands in it.

    Raises:
        ArtifactError: the container is damaged, contradicts its description, or several of its
            methods have states.
    """

    def __init__(self, path: Path, description: Description, apart: bool = False) -> None:
        super().__init__()
        description.check_one_sequence()
        # ExecuTorch trusts offsets and lengths; this reader has checked them all.
        description.check_constants(constant_methods(path), path)
        self.label = "XNNPACK on CPU"
        self._description = description
        self.seq_lengths = description.seq_lengths
        self.every_row = description.every_row
        self.context = self._constant("get_max_context_len")
        self.vocab_size = self._constant("get_vocab_size")
        self._engine = self._apart(path) if apart else Here(path, tuple(description.methods))
        self._clear()

    def _apart(self, path: Path) -> Engine:
        # Imported here: it needs `Here`.
        from llm_coreml.runtime.executorch_apart import Apart

        return Apart(path, self._description)

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
