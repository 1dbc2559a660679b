"""Quantized weights are kept on disk, used again only where nothing changed, and never trusted."""

from __future__ import annotations

import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from artifacts import SCHEMES
from llm_coreml.config import ExportConfig, resolve
from llm_coreml.errors import ConfigError
from llm_coreml.model import open_model
from llm_coreml.quantize import cache, make_plan
from llm_coreml.quantize.cache import WeightCache, default_folder
from llm_coreml.quantize.calibrate import calibration
from llm_coreml.quantize.calibrate.text import CalibrationText
from llm_coreml.quantize.formats import round as apply
from llm_coreml.quantize.formats.round import dense_rows
from llm_coreml.quantize.formats.schemes import IntGroup
from llm_coreml.quantize.quantized import build_decoder
from tiny import llama, save

CONFIG = ExportConfig(context=32)
CALIBRATED = replace(CONFIG, calibrate="bundled")
WINDOWS = tuple(tuple((7 * i + j) % 96 for j in range(20)) for i in range(4))
TEXT = CalibrationText("bundled", 80, WINDOWS)
LAYERS = 3


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = llama(vocab_size=96, intermediate_size=96, num_hidden_layers=LAYERS)
    return save(model, tmp_path / "model")


class Quantized:
    """Counts matrices that are quantized, not taken from a cache."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        for module, name in ((apply, "quantized"), (calibration, "gptq")):
            monkeypatch.setattr(module, name, self._counting(getattr(module, name)))

    def _counting(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any) -> Any:
            self.count += 1
            return function(*arguments)

        return counted

    def new(self) -> int:
        """Return how many there were since the last call."""
        count, self.count = self.count, 0
        return count


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Quantized:
    return Quantized(monkeypatch)


def build(
    source: Any, kept: Path | None, config: ExportConfig = CONFIG, text: CalibrationText = TEXT
) -> tuple[list[tuple[str, bytes]], list[str]]:
    """Return the names and bytes of all parameters, and what was noted."""
    notes: list[str] = []
    model = open_model(source)
    job = resolve(config, model.spec)
    decoder = build_decoder(
        model,
        job,
        make_plan(job, model.spec),
        calibration=text if config.calibrate else None,
        cache=WeightCache(kept, notes.append) if kept else None,
    )
    contents = [
        (name, b"".join(rows.numpy().tobytes() for rows in dense_rows(parameter)))
        for name, parameter in decoder.named_parameters()
    ]
    return contents, notes


def entries(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


# Seven linear layers per block, the table and the head.
ALL = 7 * LAYERS + 2


@pytest.mark.parametrize("config", [CONFIG, CALIBRATED], ids=["rounded", "calibrated"])
def test_a_second_decoder_is_the_same_without_quantizing(
    config: ExportConfig, folder: Path, tmp_path: Path, made: Quantized
) -> None:
    plain, _ = build(folder, None, config)
    assert made.new() == ALL
    first, _ = build(folder, tmp_path / "kept", config)
    assert made.new() == ALL
    again, notes = build(folder, tmp_path / "kept", config)
    assert made.new() == 0 and not notes
    assert plain == first == again
    assert len(entries(tmp_path / "kept")) == LAYERS + 1


def test_every_format_is_kept_whole(scheme_label: str, tmp_path: Path, made: Quantized) -> None:
    config = ExportConfig(context=32, **SCHEMES[scheme_label])
    for tied in (False, True):
        model = llama(vocab_size=96, intermediate_size=96, tie_word_embeddings=tied)
        kept = tmp_path / str(tied)
        first, _ = build(model, kept, config)
        made.new()
        again, notes = build(model, kept, config)
        assert made.new() == 0 and not notes
        assert first == again


def test_lengths_and_logits_make_no_difference(
    folder: Path, tmp_path: Path, made: Quantized
) -> None:
    build(folder, tmp_path / "kept")
    made.new()
    build(folder, tmp_path / "kept", replace(CONFIG, seq_lengths=(1, 4), logits="all", context=64))
    build(folder, tmp_path / "kept", replace(CONFIG, target="cpu"))
    assert made.new() == 0


@pytest.mark.parametrize(
    "changed",
    [{"group_size": 16}, {"scheme": "int8-channel"}, {"compute_precision": "fp32"}],
    ids=str,
)
def test_other_settings_are_quantized_anew(
    changed: dict[str, Any], folder: Path, tmp_path: Path, made: Quantized
) -> None:
    build(folder, tmp_path / "kept")
    made.new()
    config = replace(CONFIG, **changed)
    assert build(folder, tmp_path / "kept", config)[0] == build(folder, None, config)[0]
    assert made.new() >= 2 * 7 * LAYERS


def change_a_byte(folder: Path, name: str) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors[name].view(-1).view(torch.uint8)[4] ^= 1
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("config", "expected"), [(CONFIG, 7), (CALIBRATED, 14)], ids=["rounded", "calibrated"]
)
def test_a_changed_byte_changes_its_block_and_what_depends_on_it(
    config: ExportConfig, expected: int, folder: Path, tmp_path: Path, made: Quantized
) -> None:
    build(folder, tmp_path / "kept", config)
    change_a_byte(folder, "model.layers.1.mlp.up_proj.weight")
    made.new()
    resumed, _ = build(folder, tmp_path / "kept", config)
    assert made.new() == expected
    assert resumed == build(folder, None, config)[0]


def test_another_text_is_calibrated_anew(folder: Path, tmp_path: Path, made: Quantized) -> None:
    other = replace(TEXT, windows=(*WINDOWS[1:], tuple(range(20))))
    build(folder, tmp_path / "kept", CALIBRATED)
    made.new()
    resumed, _ = build(folder, tmp_path / "kept", CALIBRATED, other)
    assert made.new() == 7 * LAYERS
    assert resumed == build(folder, None, CALIBRATED, other)[0]


def test_another_version_is_not_used(
    folder: Path, tmp_path: Path, made: Quantized, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(folder, tmp_path / "kept")
    made.new()
    cache._code.cache_clear()
    real = cache.importlib.metadata.version
    monkeypatch.setattr(
        cache.importlib.metadata,
        "version",
        lambda name: "0.0.1" if name == "llm-coreml" else real(name),
    )
    try:
        build(folder, tmp_path / "kept")
    finally:
        cache._code.cache_clear()
    assert made.new() == ALL


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a byte of the data": lambda path: flip(path, -1),
    "a byte of the header": lambda path: flip(path, 40),
    "the size of the header": lambda path: flip(path, 6),
    "an end": lambda path: os.truncate(path, path.stat().st_size // 2),
    "nothing in it": lambda path: os.truncate(path, 0),
    "another file": lambda path: save_file({"x": torch.zeros(3)}, path),
    "another's entry": lambda path: path.write_bytes(b"PK\3\4" + bytes(64)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_made_anew(
    damage: str, folder: Path, tmp_path: Path, made: Quantized
) -> None:
    first, _ = build(folder, tmp_path / "kept", CALIBRATED)
    path = entries(tmp_path / "kept")[1]
    DAMAGES[damage](path)
    made.new()
    again, notes = build(folder, tmp_path / "kept", CALIBRATED)
    assert again == first and made.new() in (2, 7)
    assert len(notes) == 1 and str(path) in notes[0] and "made anew" in notes[0]
    assert build(folder, tmp_path / "kept", CALIBRATED) == (first, [])
    assert made.new() == 0


def test_an_entry_of_other_weights_is_not_used(
    folder: Path, tmp_path: Path, made: Quantized
) -> None:
    first, _ = build(folder, tmp_path / "kept", CALIBRATED)
    table, *blocks = sorted(entries(tmp_path / "kept"), key=lambda path: path.stat().st_size)
    for path in blocks:
        path.write_bytes(table.read_bytes())
    made.new()
    assert build(folder, tmp_path / "kept", CALIBRATED)[0] == first
    assert made.new() > 0


def test_a_folder_that_cannot_be_made_is_told_of_once(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    contents, notes = build(folder, tmp_path / "file" / "kept")
    assert contents == build(folder, None)[0]
    assert len(notes) == 1 and "cannot be written" in notes[0] and "--cache" in notes[0]


def test_a_full_disk_is_told_of_and_leaves_no_draft(folder: Path, tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        contents, notes = build(folder, tmp_path / "kept")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, previous)
    assert contents == build(folder, None)[0]
    assert len(notes) == 1 and "File too large" in notes[0]
    assert not list((tmp_path / "kept").iterdir())


def test_old_entries_and_drafts_make_room(tmp_path: Path) -> None:
    new, old, oldest = (f"{letter * 64}.safetensors" for letter in "abc")
    killed = ".llm-coreml-0"
    # The folder may be one that holds other things.
    others = ["mine.txt", ".bashrc", "model-00001.safetensors", ".git"]
    for age, name in enumerate([new, old, oldest]):
        (tmp_path / name).write_bytes(bytes(100))
        os.utime(tmp_path / name, (time.time() - 100 * age,) * 2)
    for name in (killed, *others):
        (tmp_path / name).write_bytes(bytes(400))
    WeightCache(tmp_path, print, largest=250)
    assert {path.name for path in tmp_path.iterdir()} == {new, old, *others}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"LLM_COREML_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, "/a"),
        ({"XDG_CACHE_HOME": "/b"}, "/b/llm-coreml"),
        ({"HOME": "/c"}, "/c/.cache/llm-coreml"),
    ],
)
def test_the_default_folder(
    environment: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("LLM_COREML_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert default_folder() == Path(expected)


@pytest.mark.parametrize(
    ("given", "told"),
    [("~nobody-at-all/c", r"\$LLM_COREML_CACHE is '~nobody-at-all/c'"), (None, "Your home folder")],
)
def test_a_home_that_nobody_knows(
    given: str | None, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(*_: object) -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("LLM_COREML_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    if given is not None:
        monkeypatch.setenv("LLM_COREML_CACHE", given)
    monkeypatch.setattr(Path, "home", unknown)
    with pytest.raises(ConfigError, match=told):
        default_folder()


# Stops for good in the middle of the third entry.
KILLED = """
import sys, time
from pathlib import Path
from quantize.test_cache import CALIBRATED, build
from llm_coreml.quantize import cache

source, kept = sys.argv[1:]
real, count = cache._write, 0

def stopping(file, weights):
    global count
    count += 1
    if count < 3:
        return real(file, weights)
    file.write(bytes(1000))
    file.flush()
    print("now", flush=True)
    time.sleep(600)

cache._write = stopping
build(source, Path(kept), CALIBRATED)
"""


def test_a_killed_export_goes_on_to_the_same_weights(
    folder: Path, tmp_path: Path, made: Quantized
) -> None:
    kept = tmp_path / "kept"
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(folder), str(kept)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"now\n"
    process.kill()
    process.communicate()
    assert len(entries(kept)) == 2, "the table and head, and the first block"
    resumed, notes = build(folder, kept, CALIBRATED)
    assert made.new() == 7 * (LAYERS - 1) and not notes
    assert resumed == build(folder, None, CALIBRATED)[0]


def in_memory(folder: Path) -> int:
    """Return the bytes of files in `folder` that this process has in memory."""
    found, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            inside = str(folder) in line
        elif inside and line.startswith("Rss:"):
            found += 1024 * int(line.split()[1])
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_is_not_in_use_leaves_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "_INTERVAL", 1e-3)
    kept = WeightCache(tmp_path / "kept", print)
    weight = apply.quantized(IntGroup(4, 32, 16), torch.randn(512, 1024))
    held = kept.store("0" * 64, {"name": weight})["name"]
    assert torch.equal(held.dequantize(), weight.dequantize())
    assert in_memory(kept.folder) > weight.qdata.nbytes  # type: ignore[attr-defined]
    with kept.paged_out():
        for _ in range(20):
            assert torch.equal(held.dequantize(), weight.dequantize())
        deadline = time.monotonic() + 30
        while in_memory(kept.folder) and time.monotonic() < deadline:
            time.sleep(1e-3)
        assert not in_memory(kept.folder)
    (found,) = kept.load("0" * 64).items()  # type: ignore[union-attr]
    assert found[0] == "name" and torch.equal(found[1].dequantize(), weight.dequantize())
    assert torch.equal(load_file(entries(kept.folder)[0])["name/qdata"], weight.qdata)  # type: ignore[attr-defined]


def test_pages_are_no_longer_dropped_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), WeightCache(tmp_path, print).paged_out():
        assert "page-out" in {thread.name for thread in threading.enumerate()}
        raise ZeroDivisionError
    assert "page-out" not in {thread.name for thread in threading.enumerate()}
