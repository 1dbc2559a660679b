"""A checkpoint that reads the tensors of another in a way of its own, and has all else from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llm_coreml.checkpoint.checkpoint import Checkpoint, Source


class CheckpointOver(Checkpoint):
    """What a checkpoint over `files` has in common with them; see `Checkpoint`.

    Attributes:
        files: The other checkpoint.
    """

    files: Checkpoint

    @property
    def config(self) -> dict[str, Any]:  # type: ignore[override]
        """Return the parsed config.json."""
        return self.files.config

    @property
    def generation_config(self) -> dict[str, Any]:  # type: ignore[override]
        """Return the parsed generation_config.json."""
        return self.files.generation_config

    @property
    def source(self) -> Source:  # type: ignore[override]
        """Return where the files came from."""
        return self.files.source

    @property
    def tokenizer_files(self) -> dict[str, Path]:  # type: ignore[override]
        """Return the tokenizer's files by name."""
        return self.files.tokenizer_files

    def save_tokenizer(self, folder: Path) -> dict[str, Path]:
        """Copy the tokenizer's files into `folder`."""
        return self.files.save_tokenizer(folder)
