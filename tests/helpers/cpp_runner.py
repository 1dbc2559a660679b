"""The runner in C++ for tests: built once for all workers of a session, and called."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from exported import Run
from llm_coreml.cpp import cmake_build
from shared import Shared


def built_once(shared: Shared, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the built runner, and let the rest of a test find it as its user would.

    A test is skipped only where nothing could build it.
    """
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("there is no C++ compiler on this machine")

    def build(folder: Path) -> None:
        monkeypatch.setenv("LLM_COREML_CACHE", str(folder))
        cmake_build.built_runner()

    folder = shared.folder("runner", [cmake_build.SOURCES / "src"], build)
    monkeypatch.setenv("LLM_COREML_CACHE", str(folder))
    return cmake_build.built_runner()


def call(runner: Path, bundle: Path, ids: Any, *words: str | int) -> Run:
    """Run the runner with tokens, or a text of them, on stdin."""
    text = ids if isinstance(ids, str) else " ".join(map(str, ids))
    command = [str(runner), str(bundle), *map(str, words)]
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=60)
    return Run(done.returncode, done.stdout, done.stderr)


def made(runner: Path, bundle: Path, ids: Any, *words: str | int) -> dict[str, Any]:
    """Return what the runner prints where all is well."""
    done = call(runner, bundle, ids, *words)
    assert (done.code, done.err) == (0, ""), done.err
    found: dict[str, Any] = json.loads(done.out)
    return found
