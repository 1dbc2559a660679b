"""The runner in C++, built once for a session."""

from __future__ import annotations

from pathlib import Path

import pytest

from cpp_runner import built_once
from shared import Shared


@pytest.fixture
def cpp_runner(shared: Shared, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The built runner, which commands of this test find too."""
    return built_once(shared, monkeypatch)
