"""An evaluation leaves out what it lacks the text for, and hides no other mistake."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import llm_coreml
from llm_coreml.errors import ConfigError
from llm_coreml.eval import originals


def test_only_a_missing_text_leaves_the_quantized_model_out(
    bundle: Path,
    checkpoint: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*args: object, **settings: object) -> None:
        raise ConfigError("no such format")

    own = Path(shutil.copytree(bundle, tmp_path / "own"))
    monkeypatch.setattr(originals, "quantize", refuse)
    with pytest.raises(ConfigError, match="no such format"):
        llm_coreml.evaluate(own, model=checkpoint, text=text_file, tokens=9)
