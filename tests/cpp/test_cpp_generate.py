"""`generate --runtime cpp`: the same text as from Python, and what the runner measured."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import llm_coreml
from exported import Run, in_process
from llm_coreml.cpp.device_run import read_device_run

PROMPT = "The quick brown fox"


@pytest.fixture
def generate(
    cpp_runner: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Any:
    def call(bundle: Path, *words: str | Path) -> Run:
        given = (bundle, "--prompt", PROMPT, "--runtime", "cpp", *words)
        return in_process(capfd, monkeypatch, "generate", *given)

    return call


def test_the_text_is_that_of_python(generate: Any, twin: Path) -> None:
    expected = llm_coreml.load(twin).generate(PROMPT, 20)
    done = generate(twin, "--max-new-tokens", "20")
    assert (done.code, done.out) == (0, expected + "\n"), done.err
    # A text that ends it may be any, and is left out.
    stop = expected[5:8]
    done = generate(twin, "--max-new-tokens", "20", "--stop", stop)
    assert done.out == expected[: expected.index(stop)] + "\n"


def test_json_and_a_record(generate: Any, twin: Path, tmp_path: Path) -> None:
    record = tmp_path / "device.json"
    done = generate(twin, "--max-new-tokens", "4", "--format", "json", "--record", record)
    found = json.loads(done.out)
    run = read_device_run(record)
    assert (run.runs, run.runs_agree) == (3, True)
    assert found["run"] == json.loads(record.read_text())
    assert (found["prompt"], found["finish"], found["new_tokens"]) == (PROMPT, "length", 4)
    assert found["text"] == llm_coreml.load(twin).generate(PROMPT, 4)
    again = generate(twin, "--record", record)
    assert again.code == 6 and "exists already; give another name to --record" in again.err
    nowhere = generate(twin, "--max-new-tokens", "1", "--record", tmp_path / "none/device.json")
    assert nowhere.code == 6 and nowhere.out == ""


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--chat",), "--chat keeps a cache from turn to turn; leave out --runtime cpp"),
        (("--mode", "fp32"), "--mode and --device belong to the reference runtime"),
        (("--device", "cuda"), "--mode and --device belong to the reference runtime"),
        (("--max-new-tokens", "0"), "max_new_tokens"),
        (("--prompt", "The " * 100), "The prompt is longer than the context of 64 positions"),
        (("--runtime", "python", "--record", "x"), "--record keeps what the C++ runner measured"),
    ],
)
def test_what_the_runner_does_not_do(
    generate: Any, twin: Path, words: tuple[str, ...], told: str
) -> None:
    done = generate(twin, *words)
    assert (done.code, done.out) == (2, "") and told in done.err, done


def test_a_program_for_core_ml_is_for_macos(
    generate: Any, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    done = generate(bundle)
    assert done.code == 2 and "on macOS alone; export with --backend xnnpack" in done.err


def test_a_damaged_program_is_one(generate: Any, twin: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(twin, tmp_path / "own"))
    data = bytearray((own / "model.pte").read_bytes())
    data[40:4000] = bytes(3960)
    (own / "model.pte").write_bytes(data)
    assert "is not the file that its manifest describes" in generate(own).err
    done = generate(own, "--unchecked")
    assert done.code == 7 and "ExecuTorch" in done.err and done.out == ""
