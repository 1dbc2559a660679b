"""The runner in C++, built once for a session, and a twin with a tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest

from cpp_runner import built_once
from llm_coreml.config import ExportConfig
from llm_coreml.pipeline import export
from shared import Shared


@pytest.fixture
def cpp_runner(shared: Shared, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The built runner, which commands of this test find too."""
    return built_once(shared, monkeypatch)


@pytest.fixture(scope="session")
def twin(shared: Shared, checkpoint: Path) -> Path:
    """The tiny model for XNNPACK."""
    config = ExportConfig(bits=16, context=64, seq_lengths=(1, 8), backend="xnnpack")

    def make(folder: Path) -> None:
        export(checkpoint, output=folder / "twin", config=config, cache=False)

    return shared.folder("twin-with-tokenizer", [checkpoint, config], make) / "twin"
