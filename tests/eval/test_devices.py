"""Figures of a device join the results of an evaluation, and nothing else does."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

import llm_coreml
from exported import Run, in_process, manifest_of
from llm_coreml.errors import ConfigError
from llm_coreml.eval.devices import import_device_run


@pytest.fixture(scope="module")
def evaluated(bundle: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with results."""
    own = Path(shutil.copytree(bundle, tmp_path_factory.mktemp("evaluated") / "own"))
    llm_coreml.evaluate(own, text=text_file, tokens=9, artifact_only=True)
    return own


@pytest.fixture
def own(evaluated: Path, tmp_path: Path) -> Path:
    """A copy that a test may write to."""
    return Path(shutil.copytree(evaluated, tmp_path / "own"))


def report(bundle: Path, **changes: Any) -> dict[str, Any]:
    """Return what a runner would print of a bundle, with changes."""
    return {
        "version": 1,
        "runner": "swift",
        "executorch": "1.5.1",
        "system": "iOS 18.1",
        "backend": "coreml",
        "program_sha256": manifest_of(bundle)["program"]["sha256"],
        "sampling": {"temperature": 0, "top_p": 1, "seed": 0},
        "prompt_ids": [0, 5, 7],
        "ids": [4, 299],
        "finish": "length",
        "runs": 3,
        "runs_agree": True,
        "load_seconds": 2.5,
        "time_to_first_token_seconds": 0.125,
        "tokens_per_second": 31.25,
        "peak_memory_bytes": 123_000_000,
        **changes,
    }


@pytest.fixture
def written(tmp_path: Path) -> Callable[[Any], Path]:
    """Return a function from a value, or bytes, to a file that holds it."""

    def write(value: Any) -> Path:
        path = tmp_path / "device.json"
        path.write_bytes(value if isinstance(value, bytes) else json.dumps(value).encode())
        return path

    return write


def results(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return found


def test_devices_join_what_was_measured(own: Path, written: Callable[[Any], Path]) -> None:
    before = results(own)
    assert before["devices"] == []
    for name in ("Mac mini", "iPhone 16 Pro"):
        import_device_run(own, written(report(own)), name)
    found, devices = import_device_run(
        own, written(report(own, tokens_per_second=None)), "Mac mini"
    )
    assert results(own) == found
    assert {**found, "devices": []} == before
    assert [each.name for each in devices] == ["Mac mini", "iPhone 16 Pro"]
    assert found["devices"][1] == {
        "name": "iPhone 16 Pro",
        "runner": "swift",
        "executorch": "1.5.1",
        "system": "iOS 18.1",
        "prompt_tokens": 3,
        "new_tokens": 2,
        "runs": 3,
        "runs_agree": True,
        "load_seconds": 2.5,
        "time_to_first_token_seconds": 0.125,
        "tokens_per_second": 31.25,
        "peak_memory_bytes": 123_000_000,
    }
    assert found["devices"][0]["tokens_per_second"] is None


def test_another_evaluation_keeps_the_devices_of_this_program(
    own: Path, written: Callable[[Any], Path], text_file: Path
) -> None:
    found, devices = import_device_run(own, written(report(own)), "Mac mini")
    again = llm_coreml.evaluate(own, text=text_file, tokens=9, artifact_only=True)
    assert again.devices == devices and results(own)["devices"] == found["devices"]
    # Another program's results, or damaged ones, are none of this one's.
    for wrong in (
        {**found, "program_sha256": "0" * 64},
        {**found, "devices": [{"name": "x"}]},
        {**found, "devices": [{**found["devices"][0], "load_seconds": "1"}]},
        [],
    ):
        (own / "results.json").write_text(json.dumps(wrong))
        assert llm_coreml.evaluate(own, text=text_file, tokens=2, artifact_only=True).devices == ()


def test_devices_that_are_lost_are_told(
    own: Path,
    text_file: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = ("eval", own, "--text", text_file, "--tokens", "9", "--artifact-only")
    (own / "results.json").write_text("{")
    found = in_process(capfd, monkeypatch, *words)
    assert found.code == 0 and "devices in it are not kept" in " ".join(found.err.split())
    assert "not kept" not in in_process(capfd, monkeypatch, *words).err


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"program_sha256": "0" * 64}, r"tells of another program \(SHA-256 000000000000\.\.\.\)"),
        ({"ids": [300]}, "tokens up to 300, and the program has .* a vocabulary of 300"),
        ({"ids": [1] * 63}, "tells of 65 tokens .*, and the program has a context of 64"),
        ({"backend": "xnnpack"}, "tells of a program for xnnpack, and this one is for coreml"),
        ({"version": 2}, r"nothing that a runner prints: \$\.version: 1 was expected"),
        ({"runner": "rust"}, r"\$\.runner: 'rust' is not one of"),
        ({"more": 1}, r"\$: Additional properties are not allowed"),
        ({"ids": [-1]}, r"\$\.ids\[0\]: -1 is less than the minimum"),
        ({"ids": [1.0]}, r"\$\.ids\[0\]: 1\.0 is not of type 'integer'"),
        ({"prompt_ids": []}, r"\$\.prompt_ids: \[\] should be non-empty"),
        ({"runs": 0}, r"\$\.runs: 0 is less"),
        ({"tokens_per_second": 0}, r"\$\.tokens_per_second: 0 is not valid"),
        ({"load_seconds": 2e9}, r"\$\.load_seconds: 2000000000\.0 is greater"),
        ({"load_seconds": -1}, r"\$\.load_seconds: -1 is less"),
        ({"system": "x" * 300}, r"\$\.system: .* breaks its rule, maxLength"),
        ({"program_sha256": "0" * 64 + "\n"}, r"\$\.program_sha256: .* is too long"),
    ],
)
def test_what_does_not_fit_is_refused(
    own: Path, written: Callable[[Any], Path], changes: Mapping[str, Any], told: str
) -> None:
    before = (own / "results.json").read_bytes()
    with pytest.raises(ConfigError, match=told):
        import_device_run(own, written(report(own, **changes)), "Mac")
    assert (own / "results.json").read_bytes() == before


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"", "nothing that a runner prints"),
        (b'{"version": 1', "nothing that a runner prints"),
        (b"[" * 10_000, "nests deeper"),
        (b"\xff", "no UTF-8"),
        (b"NaN", "not finite"),
        (b"[]", "not of type 'object'"),
        (b" " * (1 << 24) + b"{}", "larger than what any runner prints"),
    ],
    ids=["empty", "half", "deep", "bytes", "nan", "list", "large"],
)
def test_hostile_files_are_refused(
    own: Path, written: Callable[[Any], Path], data: bytes, told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        import_device_run(own, written(data), "Mac")


def test_no_file_no_name_and_no_results(own: Path, written: Callable[[Any], Path]) -> None:
    for path in (own / "none.json", own, Path("/dev/zero")):
        with pytest.raises(ConfigError, match="is no file; give what a runner printed"):
            import_device_run(own, path, "Mac")
    run = written(report(own))
    for name in ("", "  ", "x" * 101, "a\nb", "\x1b[31m"):
        with pytest.raises(ConfigError, match="--device-name is"):
            import_device_run(own, run, name)
    (own / "results.json").unlink()
    with pytest.raises(ConfigError, match=r"has no results\.json of this program"):
        import_device_run(own, run, "Mac")


def test_the_command_shows_a_table(
    own: Path,
    written: Callable[[Any], Path],
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def call(*words: str | Path) -> Run:
        return in_process(capfd, monkeypatch, "eval", own, *words)

    path = written(report(own, runs_agree=False))
    done = call("--import", path, "--device-name", "iPhone 16 Pro")
    row = done.out.splitlines()[1]
    for cell in ("iPhone 16 Pro", "ExecuTorch 1.5.1 (swift)", "2.50 s", "125.0 ms", "31.2",
                 "123 MB", "3 + 2 tokens; its runs differ"):  # fmt: skip
        assert cell in row, row
    as_json = call("--import", path, "--device-name", "Mac", "--format", "json")
    assert json.loads(as_json.out) == results(own)
    for words in (("--import", path), ("--device-name", "Mac")):
        alone = call(*words)
        assert alone.code == 2 and "--import and --device-name belong together" in alone.err
