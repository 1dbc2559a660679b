"""ExecuTorch's runtime with one program, here or elsewhere.

engine = Here(Path("out/model.pte"), ("forward",))
engine.load()
logits = engine.run("forward", tokens, start_pos, (1, 1, 32000))
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, final

import torch

from llm_coreml.artifact.limits import reason
from llm_coreml.errors import ArtifactError


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
        # What the methods take behind tokens and position, and give behind logits.
        self._caches: list[torch.Tensor] = []

    def load(self) -> None:
        """Load the program's methods."""
        from executorch.runtime import Verification

        with self._told():
            program = self._runtime.load_program(self._path, verification=Verification.Minimal)
            self._methods = {name: program.load_method(name) for name in self._names}
        missing = [name for name, method in self._methods.items() if method is None]
        if missing:
            raise ArtifactError(f"'{self._path}' has no method '{missing[0]}'; export again.")
        with self._told():
            self._caches = _empty_caches(program.metadata(self._names[0]))

    def run(
        self, method: str, tokens: torch.Tensor, start_pos: torch.Tensor, shape: Sequence[int]
    ) -> torch.Tensor:
        """Call a method."""
        with self._told():
            results = self._methods[method].execute([tokens, start_pos, *self._caches])
        logits = results[0] if results else None
        if len(results) != 1 + len(self._caches):
            raise ArtifactError(
                f"'{self._path}' takes {len(self._caches)} caches and gives {len(results) - 1}; "
                "export again."
            )
        self._caches = [cache.clone() for cache in results[1:]]
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


# ExecuTorch's numbers of the element types that caches have.
_DTYPES = {5: torch.float16, 6: torch.float32}


def _empty_caches(method: Any) -> list[torch.Tensor]:
    """Return zeros for every argument of a method behind tokens and position.

    Raises:
        ValueError: one is no float tensor.
    """
    told = [method.input_tensor_meta(at) for at in range(2, method.num_inputs())]
    other = {each.dtype() for each in told} - _DTYPES.keys()
    if other:
        raise ValueError(f"a cache has the element type {min(other)}")
    return [torch.zeros(tuple(each.sizes()), dtype=_DTYPES[each.dtype()]) for each in told]
