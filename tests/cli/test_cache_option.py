"""`--cache` says where the KV cache is, or which folder keeps quantized weights, or both."""

from __future__ import annotations

from pathlib import Path

import click
import pytest

from llm_coreml.cli.export import _parted


def test_words_are_the_kv_cache_s_and_other_words_are_folders() -> None:
    assert _parted(()) == ({}, None)
    assert _parted(("inputs",)) == ({"cache": "inputs"}, None)
    assert _parted(("kept",)) == ({}, Path("kept"))
    assert _parted(("kept", "state")) == ({"cache": "state"}, Path("kept"))
    assert _parted(("./inputs",)) == ({}, Path("inputs"))


@pytest.mark.parametrize("words", [("state", "inputs"), ("a", "b"), ("inputs", "inputs")])
def test_one_of_each_is_all(words: tuple[str, ...]) -> None:
    with pytest.raises(click.UsageError, match="contradict each other"):
        _parted(words)
