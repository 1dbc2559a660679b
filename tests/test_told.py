"""What an export tells before it begins to work: readings, contexts and states in doubt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llm_coreml import ExportConfig
from llm_coreml.pipeline import export
from llm_coreml.progress import Silent
from tiny import llama, save


class Work(Exception):
    """The export has begun to work."""


class Listener(Silent):
    """Keeps what is told until the work begins."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        """Keep it."""
        self.notes.append(text)

    def stage(self, name: str) -> None:
        """Stop before weights are read."""
        if name == "quantize":
            raise Work


def told(folder: Path, output: Path, **settings: Any) -> str:
    """Return what an export of `folder` tells, a line each."""
    listener = Listener()
    config = ExportConfig(**{"context": 32, "seq_lengths": (1, 8), "bits": 16, **settings})
    with pytest.raises(Work):
        export(folder, output=output, config=config, cache=False, progress=listener)
    assert not output.exists()
    return "\n".join(listener.notes)


def change(folder: Path, file: str, **changes: Any) -> None:
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_states_that_the_neural_engine_refuses(tmp_path: Path) -> None:
    folder = save(llama(head_dim=20), tmp_path / "model")
    sentence = (
        "the Neural Engine's compiler has been reported to refuse states whose width, which is the "
        "model's head_dim, is no multiple of 32 (coremltools issue 2631), and this model's are "
        "[1, 2, 64, 20]; give --pad-heads or --target gpu."
    )
    for target in ("ane", "all"):
        assert f"--target {target}: {sentence}" in told(folder, tmp_path / "out", target=target)
    for other in ({"target": "gpu"}, {"target": "cpu"}, {"target": "ane", "backend": "xnnpack"}):
        assert "head_dim" not in told(folder, tmp_path / "out", **other)
    wide = save(llama(head_dim=32), tmp_path / "wide")
    assert "head_dim" not in told(wide, tmp_path / "out", target="ane")


def test_what_config_json_says_twice_and_a_context_beyond_it(tmp_path: Path) -> None:
    folder = save(llama(), tmp_path / "model")
    assert "config.json" not in told(folder, tmp_path / "out")
    change(folder, "config.json", rope_scaling={"type": "linear", "factor": 4.0})
    assert "transformers takes rope_scaling alone" in told(folder, tmp_path / "out")
    assert "names 64 positions; the 256 of --context rest on" in told(
        folder, tmp_path / "out", context=256
    )
