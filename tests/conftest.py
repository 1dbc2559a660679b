"""Settings of every test run, and artifacts that several files look at."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from artifacts import UNQUANTIZED, Artifact, lower
from llm_coreml.config import ExportConfig
from tiny import llama

pytest_plugins = ["exported"]

# Tiny operations gain nothing from threads, and lose much to them beside other work.
torch.set_num_threads(1)

# label -> settings; together they put every format into the blocks, the table and the head.
SCHEMES: dict[str, dict[str, Any]] = {
    "int4-group-32": {"scheme": "int4-group"},
    "int4-group-8": {
        "scheme": "int4-group",
        "group_size": 8,
        "embedding": "none",
        "lm_head": "int4-channel",
    },
    "int4-channel": {"scheme": "int4-channel", "embedding": "int4-channel"},
    "int8-channel": {"scheme": "int8-channel", "embedding": "int4-group", "lm_head": "none"},
    "codebook-1": {"bits": 1, "embedding": "codebook:6", "lm_head": "int4-group"},
    "codebook-2": {"bits": 2, "embedding": "codebook:8", "lm_head": "codebook:1"},
    "codebook-3": {"bits": 3, "codebook_rows": 8, "embedding": "codebook:3"},
    "codebook-4": {"bits": 4, "scheme": "codebook", "codebook_rows": 1, "target": "ane"},
    "codebook-6": {"bits": 6, "embedding": "codebook:2", "lm_head": "codebook:4"},
    "int3-group": {
        "scheme": "int3-group",
        "zero_point": "int",
        "embedding": "mxfp4",
        "lm_head": "codebook:6",
        "codebook_vector": 2,
        "minimum_os": "iOS26",
    },
    "codebook-8": {"bits": 8, "scheme": "codebook", "lm_head": "codebook:8"},
}
TIED = ("int4-channel", "codebook-3", "codebook-6")


@pytest.fixture(scope="session", autouse=True)
def weight_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Keep what tests quantize out of the user's cache."""
    folder = tmp_path_factory.mktemp("weights")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLM_COREML_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Artifact]:
    """Return a function from a label in `SCHEMES` to its artifact, lowered at the first call."""
    folder = tmp_path_factory.mktemp("quantized")
    made: dict[str, Artifact] = {}

    def make(label: str) -> Artifact:
        if label not in made:
            model = llama(vocab_size=96, intermediate_size=96, tie_word_embeddings=label in TIED)
            config = ExportConfig(context=32, seq_lengths=(1, 8), **SCHEMES[label])
            made[label] = lower(model, config, folder / f"{label}.pte")
        return made[label]

    return make


@pytest.fixture(scope="session")
def three_layers(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """A tied, unquantized decoder of three layers."""
    model = llama(num_hidden_layers=3, vocab_size=257, tie_word_embeddings=True)
    config = ExportConfig(context=32, seq_lengths=(1, 16), **UNQUANTIZED)
    return lower(model, config, tmp_path_factory.mktemp("three") / "model.pte")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run every test that asks for `scheme_label` once per entry of `SCHEMES`."""
    if "scheme_label" in metafunc.fixturenames:
        metafunc.parametrize("scheme_label", SCHEMES)
