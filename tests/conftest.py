"""Settings of every test run, and artifacts that several files look at."""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from artifacts import FURTHER, SCHEMES, TIED, UNQUANTIZED, Artifact, lower
from cases import cases
from llm_coreml.config import ExportConfig
from llm_coreml.machine import collect_rarely
from shared import Shared
from tiny import llama

pytest_plugins = ["exported", "hub_server"]

# Tiny operations gain nothing from threads, and lose much to them beside other work.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start
collect_rarely()

FEW_MODULES = 100
# The file whose tests run, and how many modules were loaded when garbage was last searched for.
_searched: tuple[Path | None, int] = None, 0


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Let SIGINT interrupt this process, as pytest's workers do not."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session", autouse=True)
def weight_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Keep what tests quantize out of the user's cache."""
    folder = tmp_path_factory.mktemp("weights")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLM_COREML_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Shared:
    """Return what this session's workers share; beside other sessions it is empty at first."""
    base = tmp_path_factory.getbasetemp()
    # A worker's own folder lies in that of the session.
    root = (base if worker_id == "master" else base.parent) / "shared"
    root.mkdir(exist_ok=True)
    return Shared(root)


@pytest.fixture(scope="session")
def quantized(shared: Shared) -> Callable[[str], Artifact]:
    """Return a function from a label in `SCHEMES` to its artifact, lowered at the first call."""
    made: dict[str, Artifact] = {}

    def make(label: str) -> Artifact:
        if label not in made:
            model = llama(vocab_size=96, intermediate_size=96, tie_word_embeddings=label in TIED)
            config = ExportConfig(context=32, seq_lengths=(1, 8), **SCHEMES[label])
            made[label] = lower(model, config, shared)
        return made[label]

    return make


@pytest.fixture(scope="session")
def three_layers(shared: Shared) -> Artifact:
    """A tied, unquantized decoder of three layers."""
    model = llama(num_hidden_layers=3, vocab_size=257, tie_word_embeddings=True)
    config = ExportConfig(context=32, seq_lengths=(1, 16), **UNQUANTIZED)
    return lower(model, config, shared)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Have the search for garbage pass over the libraries, and what earlier files have left.

    A search through these takes most of a second, and every export asks for several.
    """
    global _searched
    path, loaded = _searched
    if item.path != path or len(sys.modules) > loaded + FEW_MODULES:
        _searched = item.path, len(sys.modules)
        gc.collect()
        gc.freeze()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run every test that asks for `scheme_label` once per entry of `SCHEMES`."""
    if "scheme_label" in metafunc.fixturenames:
        # Only a lowering takes long.
        further = FURTHER if "quantized" in metafunc.fixturenames else ()
        metafunc.parametrize("scheme_label", cases(SCHEMES, further))
