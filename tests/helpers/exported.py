"""A tiny model with a real tokenizer, exported once by the command line for all tests that look.

Loaded as a plugin by `conftest.py`, so that its fixtures are there for every test.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from shared import Shared
from tiny import llama

SHAPES = ("--context", "64", "--seq-lengths", "1,8")
# What coremltools, torch and ExecuTorch say of themselves during an export.
CHATTER = ("Failed to load", "passes/s", "not been tested", "ops/s", "Warning:")
TEXT = """The quick brown fox jumps over the lazy dog. A program is read more often than it is
written, and so the reader's time is worth more than the writer's. Measure the thing itself, not
the thing that it was made from; then say what was measured, where, and by which tool.
"""


@dataclass(frozen=True)
class Run:
    """A finished command."""

    code: int
    out: str
    err: str


def command(*words: str | Path) -> list[str]:
    """Return the words that run `llm-coreml` in this interpreter."""
    return [sys.executable, "-m", "llm_coreml.cli", *map(str, words)]


def run(*words: str | Path, **environment: str) -> Run:
    """Run `llm-coreml` in a process of its own, with the warnings of a user's machine.

    It gets one thread, as this process has: their number decides the order of fp32 sums, and with
    it the last digits of measured figures.
    """
    settings = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(command(*words), capture_output=True, text=True, env=settings)
    return Run(done.returncode, done.stdout, done.stderr)


def in_process(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: str | Path
) -> Run:
    """Run `llm-coreml` in this process, which has its libraries loaded already."""
    from llm_coreml.cli.main import main

    capfd.readouterr()
    monkeypatch.setattr(sys, "argv", ["llm-coreml", *map(str, words)])
    monkeypatch.setenv("COLUMNS", "1000")
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    with pytest.raises(SystemExit) as ended:
        main()
    out, err = capfd.readouterr()
    assert isinstance(ended.value.code, int)
    return Run(ended.value.code, out, err)


def make_tokenizer() -> Any:
    """Train a byte-level tokenizer of 300 entries, `<s>` and `</s>` first."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


def make_model(**changes: Any) -> Any:
    """Return a random Llama of one layer for `make_tokenizer`."""
    sizes: dict[str, Any] = {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 64,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "tie_word_embeddings": True,
    }
    return llama(**{**sizes, **changes})


def save_model(folder: Path, model: Any) -> Path:
    """Write a checkpoint folder, tokenizer included."""
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def files_of(folder: Path) -> set[str]:
    """Return everything below `folder`, hidden files too."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def manifest_of(bundle: Path) -> dict[str, Any]:
    """Return the parsed `manifest.json`."""
    manifest: dict[str, Any] = json.loads((bundle / "manifest.json").read_text())
    return manifest


def write_manifest(bundle: Path, manifest: dict[str, Any]) -> None:
    """Write another manifest, as an export that made it would: with the checksum that it needs."""
    from llm_coreml.bundle.seal import checksum

    if manifest["version"] >= 3:
        manifest["checksum"] = checksum(manifest)
    (bundle / "manifest.json").write_text(json.dumps(manifest))


@pytest.fixture(scope="session")
def live_model() -> Any:
    """The tiny model, as `transformers` holds it."""
    return make_model()


@pytest.fixture(scope="session")
def checkpoint(shared: Shared, live_model: Any) -> Path:
    """The tiny model, as a folder."""
    return shared.file("tiny-llama", [live_model], lambda folder: save_model(folder, live_model))


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text to measure on."""
    path = tmp_path_factory.mktemp("text") / "tëxt.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def export_run(shared: Shared, checkpoint: Path) -> tuple[Run, Path]:
    """What `llm-coreml export --format json` said, and the bundle that it wrote."""
    words = ("export", checkpoint, *SHAPES, "--bits", "4", "--format", "json")

    def export(folder: Path) -> None:
        (folder / "exports").mkdir()
        done = run(*words, "-o", folder / "exports/bundle")
        assert done.code == 0, done.err
        (folder / "run.json").write_text(json.dumps(vars(done)))

    folder = shared.folder("exported", [checkpoint, " ".join(map(str, words))], export)
    return Run(**json.loads((folder / "run.json").read_text())), folder / "exports/bundle"


@pytest.fixture(scope="session")
def bundle(export_run: tuple[Run, Path]) -> Path:
    """The exported tiny model. Tests read it, and copy it before they change it."""
    return export_run[1]


@pytest.fixture(scope="session")
def twin(shared: Shared, checkpoint: Path) -> Path:
    """The tiny model for XNNPACK."""
    from llm_coreml.config import ExportConfig
    from llm_coreml.pipeline import export

    config = ExportConfig(bits=16, context=64, seq_lengths=(1, 8), backend="xnnpack")

    def make(folder: Path) -> None:
        export(checkpoint, output=folder / "twin", config=config, cache=False)

    return shared.folder("twin-with-tokenizer", [checkpoint, config], make) / "twin"
