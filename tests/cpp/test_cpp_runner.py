"""The runner in C++: the tokens of Python's ExecuTorch, and one sentence for whatever is wrong."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cpp_runner import call, made
from exported import manifest_of
from llm_coreml.artifact.pte import read_delegates
from llm_coreml.bundle.bundle_runner import open_runner
from llm_coreml.bundle.folder import open_bundle
from llm_coreml.cpp.device_run import parse_device_run
from llm_coreml.runtime.runner import Runner

PROMPT = list(range(2, 31))  # 3 x 8 + 5 x 1


@pytest.fixture(scope="module")
def python(twin: Path) -> Runner:
    """The same program on ExecuTorch, from Python."""
    return open_runner(open_bundle(twin))


@pytest.fixture
def own(twin: Path, tmp_path: Path) -> Path:
    """A copy that a test may write to."""
    return Path(shutil.copytree(twin, tmp_path / "own"))


# Tokens


@pytest.mark.parametrize("prompt", [PROMPT, PROMPT[:1], PROMPT[:8], PROMPT * 2], ids=len)
def test_greedy_tokens_are_those_of_python(
    cpp_runner: Path, twin: Path, python: Runner, prompt: list[int]
) -> None:
    expected = list(python.generate(prompt, 20))
    assert made(cpp_runner, twin, prompt, "--max-new-tokens", 20)["ids"] == expected
    assert len(expected) == min(20, 64 - len(prompt) + 1)


def test_a_report_fits_its_schema_and_tells_what_was_asked(cpp_runner: Path, twin: Path) -> None:
    words = ("--max-new-tokens", 5, "--temperature", 0.5, "--top-p", 0.25, "--seed", 2**63 - 1)
    done = call(cpp_runner, twin, PROMPT, *words)
    found = parse_device_run(done.out.encode())
    assert found.prompt_ids == tuple(PROMPT) and len(found.ids) == 5
    assert (found.runner, found.backend, found.finish) == ("cpp", "xnnpack", "length")
    assert (found.sampling.temperature, found.sampling.top_p) == (0.5, 0.25)
    assert found.sampling.seed == 2**63 - 1
    assert found.program_sha256 == manifest_of(twin)["program"]["sha256"]
    assert found.executorch.startswith("1.5.")
    assert 0 < found.time_to_first_token_seconds < 60 and found.load_seconds > 0
    assert found.tokens_per_second is not None and found.tokens_per_second > 0
    assert manifest_of(twin)["program"]["bytes"] < found.peak_memory_bytes < 1e9


def test_a_reset_forgets_what_was_read(cpp_runner: Path, twin: Path) -> None:
    """What a run leaves in the cache behind a short prompt would move every later one."""
    once = made(cpp_runner, twin, PROMPT[:3], "--max-new-tokens", 40)
    often = made(cpp_runner, twin, PROMPT[:3], "--max-new-tokens", 40, "--runs", 3, "--warm-up", 1)
    assert often["runs"] == 3 and often["runs_agree"] is True
    assert often["ids"] == once["ids"]


def test_draws_repeat_by_seed_and_stay_in_the_nucleus(
    cpp_runner: Path, twin: Path, python: Runner
) -> None:
    words = ("--max-new-tokens", 30, "--temperature", 1.5, "--top-p", 0.6, "--seed")
    drawn = [made(cpp_runner, twin, PROMPT, *words, seed)["ids"] for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    rows = python.logits([*PROMPT, *drawn[0]])[len(PROMPT) - 1 : -1]
    shares, order = (rows.double() / 1.5).softmax(-1).sort(descending=True)
    places = [order[at].tolist().index(token) for at, token in enumerate(drawn[0][: len(rows)])]
    before = [float(shares[at, :place].sum()) for at, place in enumerate(places)]
    # The token that crosses the threshold belongs to the nucleus.
    assert max(before) < 0.6 + 1e-4 and max(places) > 2
    greedy = made(cpp_runner, twin, PROMPT, "--max-new-tokens", 30)["ids"]
    nearly = ("--max-new-tokens", 30, "--temperature", 1.0, "--top-p", 1e-9)
    assert made(cpp_runner, twin, PROMPT, *nearly)["ids"] == greedy
    cold = ("--max-new-tokens", 30, "--temperature", 1e-300)
    assert made(cpp_runner, twin, PROMPT, *cold)["ids"] == greedy


def test_why_a_text_ends(cpp_runner: Path, twin: Path, own: Path) -> None:
    ids = made(cpp_runner, twin, PROMPT, "--max-new-tokens", 6)["ids"]
    third = next(at for at in range(1, 6) if ids[at] not in ids[:at])
    stopped = made(cpp_runner, twin, PROMPT, "--stop", f"299,{ids[third]}")
    assert (stopped["ids"], stopped["finish"]) == (ids[:third], "stop")
    at_once = made(cpp_runner, twin, PROMPT, "--stop", ids[0])
    assert (at_once["ids"], at_once["tokens_per_second"]) == ([], None)
    full = made(cpp_runner, twin, PROMPT, "--max-new-tokens", 1000)
    assert (len(full["ids"]), full["finish"]) == (64 - len(PROMPT) + 1, "context")


def test_tokens_from_a_file(cpp_runner: Path, twin: Path, tmp_path: Path) -> None:
    path = tmp_path / "ids.txt"
    path.write_text("2, 3,4\n\t5 6\r\n")
    found = made(cpp_runner, twin, "", "--ids", str(path), "--max-new-tokens", 2)
    assert found["prompt_ids"] == [2, 3, 4, 5, 6]


# What is wrong


@pytest.mark.parametrize(
    ("ids", "words", "told"),
    [
        ([300], (), "Token 1 of the prompt is 300, outside the vocabulary of 300 entries"),
        ([2, -1], (), "Token 2 of the prompt is -1, outside"),
        ("2 x", (), "Token 2 of the prompt is no whole number"),
        ("9" * 50, (), "Token 1 of the prompt is no whole number"),
        ("0" * 32 + "5", (), "Token 1 of the prompt is no whole number"),
        ("2 0x3", (), "Token 2 of the prompt is no whole number"),
        ("2 \0", (), "Token 2 of the prompt is no whole number"),
        ("", (), "There are no tokens in the prompt"),
        ([2] * 65, (), "The prompt is longer than the context of 64 positions"),
        ([2], ("--ids", "/nowhere"), "'/nowhere' cannot be read"),
        ([2], ("--ids", "."), "'.' cannot be read"),
        ([2], ("--max-new-tokens", 0), "--max-new-tokens takes a whole number from 1 to"),
        ([2], ("--max-new-tokens", "1e3"), "--max-new-tokens takes a whole number from 1 to"),
        ([2], ("--temperature", "nan"), "--temperature takes a finite number of 0 or more"),
        ([2], ("--temperature", "inf"), "--temperature takes a finite number of 0 or more"),
        ([2], ("--top-p", 0), "--top-p takes a number above 0 and at most 1"),
        ([2], ("--top-p", 1.5), "--top-p takes a number above 0 and at most 1"),
        ([2], ("--seed", -1), "--seed takes a whole number from 0 to 9223372036854775807"),
        ([2], ("--stop", "1,,2"), "--stop takes a whole number from 0 to"),
        ([2], ("--runs", 10**20), "--runs takes a whole number from 1 to 1000"),
        ([2], ("--runs",), "--runs takes a value"),
        ([2], ("--nonsense",), "'--nonsense' is no option of the runner"),
        ([2], ("again",), "'again' is no option of the runner"),
    ],
)  # fmt: skip
def test_wrong_requests(
    cpp_runner: Path, twin: Path, ids: Any, words: tuple[str | int, ...], told: str
) -> None:
    done = call(cpp_runner, twin, ids, *words)
    assert (done.code, done.out) == (2, ""), done.err
    assert told in done.err and len(done.err.splitlines()) == 1


def edited(**changes: Any) -> Callable[[Path], None]:
    """Return what changes fields of a manifest's program; None removes one."""

    def edit(folder: Path) -> None:
        manifest = manifest_of(folder)
        for name, value in changes.items():
            place = manifest["program"]
            *path, last = name.split("__")
            for key in path:
                place = place[key]
            place[last] = value
            if value is None:
                del place[last]
        (folder / "manifest.json").write_text(json.dumps(manifest))

    return edit


def content(data: bytes, name: str = "manifest.json") -> Callable[[Path], None]:
    return lambda folder: void((folder / name).write_bytes(data))


def void(_: object) -> None:
    return None


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def broken_inside(folder: Path) -> None:
    """Leave the container in order, and its first graph none."""
    path = folder / "model.pte"
    data = bytes(read_delegates(path)[0].data)
    whole = path.read_bytes()
    at = whole.index(data) + 32
    path.write_bytes(whole[:at] + b"\xff" * (len(data) - 32) + whole[at + len(data) - 32 :])


def of_zeros(folder: Path) -> None:
    path = folder / "model.pte"
    path.write_bytes(bytes(path.stat().st_size))


WRONG: dict[str, tuple[Callable[[Path], None], str]] = {
    "no manifest": (without("manifest.json"), "manifest.json' is no file"),
    "no program": (without("model.pte"), "model.pte' is not there"),
    "an empty manifest": (content(b""), "is damaged: no value at byte 0"),
    "no JSON": (content(b"{'a': 1}"), "no key at byte 1"),
    "half of it": (content(b'{"program": {"bytes": 1'), "no '}' at byte 23"),
    "an open string": (content(b'{"pro'), "a string without an end at byte 5"),
    "twice": (content(b'{"a": 1, "a": 2}'), "a key stands twice in its object"),
    "too deep": (content(b"[" * 100_000), "it nests deeper than 32 levels"),
    "too large a number": (content(b'{"a": 99999999999999999999}'), "no number of 64 bits"),
    "an infinite number": (content(b'{"a": 1e999}'), "no finite number"),
    "half a character": (content(b'{"a": "\\ud800"}'), "half a character"),
    "an unknown escape": (content(b'{"a": "\\x"}'), "an unknown escape"),
    "a line in a string": (content(b'{"a": "\n"}'), "a control character in a string"),
    "something behind": (content(b"{} x"), "something follows the value"),
    "a list": (content(b"[]"), "$.program is missing"),
    "too large": (content(b" " * (1 << 22) + b"{}"), "is larger than any manifest"),
    "no lengths": (edited(methods__forward__seq_lengths=None), "seq_lengths is missing"),
    "empty lengths": (edited(methods__forward__seq_lengths=[]), "one that reads no tokens"),
    "negative lengths": (edited(methods__forward__seq_lengths=[1, -8]), "no whole number from 1"),
    "words as lengths": (edited(methods__forward__seq_lengths="1, 8"), "is no list"),
    "no methods": (edited(methods={}), "one that reads no tokens, or none"),
    "another size": (edited(bytes=7), "the manifest tells of 7; export again"),
    "a float as size": (edited(bytes=7.5), "$.program.bytes is no whole number"),
    "no hash": (edited(sha256="x"), "$.program.sha256 is no SHA-256"),
    "another context": (edited(constant_methods__get_max_context_len=4096), "its get_max_context"),
    "another vocabulary": (edited(constant_methods__get_vocab_size=299), "its get_vocab_size"),
    "another end": (edited(constant_methods__get_eos_ids=[1, 2]), "by its get_eos_ids"),
    "no end": (edited(constant_methods__get_eos_ids=None), "by its get_eos_ids"),
    "another method": (edited(methods={"other": {"seq_lengths": [1]}}), "cannot be loaded by"),
    "longer calls": (edited(methods__forward__seq_lengths=[1, 16]), "cannot be run by ExecuTorch"),
    "no program inside": (of_zeros, "cannot be read by ExecuTorch (Error::"),
    "a broken graph": (broken_inside, "cannot be loaded by ExecuTorch (Error::"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_bundles(cpp_runner: Path, own: Path, name: str) -> None:
    change, told = WRONG[name]
    change(own)
    done = call(cpp_runner, own, [2] * 20, "--max-new-tokens", 2)
    assert (done.code, done.out) == (7, ""), (done.code, done.err)
    assert told in done.err and len(done.err.splitlines()) == 1
    assert done.err.isprintable() is False and done.err[:-1].isprintable()


def test_no_bundle_and_no_place_for_the_result(
    cpp_runner: Path, twin: Path, tmp_path: Path
) -> None:
    for path in (tmp_path / "none", twin / "model.pte", tmp_path / ("x" * 300)):
        done = call(cpp_runner, path, [2])
        assert done.code == 7 and "give the folder that an export wrote" in done.err
    assert call(cpp_runner, Path(), [2]).code == 7


def test_a_manifest_of_escapes_and_floats_is_read(cpp_runner: Path, own: Path) -> None:
    """JSON has more ways to write a manifest than the exporter uses."""
    manifest = manifest_of(own)
    manifest["more"] = [-1.5e-3, 0.0, -7, True, None, '\\"\b\f\n\r\t/ä\U0001f600', {}, []]
    text = json.dumps(manifest, indent=3).replace('"forward"', '"\\u0066\\u006Frward"')
    (own / "manifest.json").write_text(text)
    assert len(made(cpp_runner, own, PROMPT, "--max-new-tokens", 2)["ids"]) == 2


@pytest.mark.parametrize("seed", range(3))
def test_mutated_manifests_end_in_a_sentence_or_run(cpp_runner: Path, own: Path, seed: int) -> None:
    chance = random.Random(seed)
    path = own / "manifest.json"
    honest = path.read_bytes()
    begin = honest.index(b'"program"')
    codes = []
    for _ in range(20):
        data = bytearray(honest)
        for _ in range(chance.choice((1, 1, 3))):
            at = chance.randrange(begin, len(data))
            data[at : at + chance.choice((0, 1, 1, 4))] = chance.choice(
                (b"", b"9", b"-", b'"', b"{", b"]", b",", b"\xff", b"1e9", b"null")
            )
        path.write_bytes(data)
        done = call(cpp_runner, own, [2] * 9, "--max-new-tokens", 1)
        assert done.code in (0, 2, 7), (done.code, done.err)
        assert len(done.err.splitlines()) == (done.code != 0)
        codes.append(done.code)
    assert 7 in codes


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what a process catches")
def test_a_crash_is_told_in_a_sentence(cpp_runner: Path, twin: Path) -> None:
    """ExecuTorch trusts a program, so that a damaged one may crash it."""
    process = subprocess.Popen(
        [cpp_runner, twin], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    status = Path(f"/proc/{process.pid}/status")
    while not caught(status.read_text()) >> (signal.SIGSEGV - 1) & 1:
        assert process.poll() is None
    process.send_signal(signal.SIGSEGV)
    out, err = process.communicate()
    assert (process.returncode, out) == (7, b"")
    assert err.startswith(b"The program crashed ExecuTorch") and err.count(b"\n") == 1


def caught(status: str) -> int:
    """Return the signals that a process has handlers for, a bit each."""
    return int(status.partition("SigCgt:")[2].split()[0], 16)


@pytest.mark.parametrize("seed", range(12))
def test_mutated_programs_end_in_a_sentence_or_run(cpp_runner: Path, own: Path, seed: int) -> None:
    chance = random.Random(seed)
    path = own / "model.pte"
    data = bytearray(path.read_bytes())
    inside = int.from_bytes(data[16:24], "little")  # the plan, without weights
    for _ in range(chance.choice((1, 2, 8))):
        data[chance.randrange(40, inside)] = chance.randrange(256)
    path.write_bytes(data)
    done = call(cpp_runner, own, [2] * 9, "--max-new-tokens", 1)
    assert done.code in (0, 7), (done.code, done.err)
    assert len(done.err.splitlines()) == (done.code != 0)


@pytest.mark.parametrize("number", ["nan", "inf"])
def test_logits_that_are_no_numbers(number: str, cpp_runner: Path, own: Path) -> None:
    """A program whose weights are NaN or infinite has no most likely token."""
    path = own / "model.pte"
    whole = bytearray(path.read_bytes())
    # Where most of the file is weights, floats of a normal size become NaN.
    floats = torch.frombuffer(whole[: len(whole) // 4 * 4], dtype=torch.float32)
    ordinary = (floats.abs() > 1e-3) & (floats.abs() < 10)
    assert ordinary.float().mean() > 0.3
    weights = ordinary.nonzero()[len(floats) // 8 :].flatten()
    floats[weights[len(weights) // 2 :]] = float(number)
    path.write_bytes(floats.numpy().tobytes() + bytes(whole[len(whole) // 4 * 4 :]))
    done = call(cpp_runner, own, PROMPT, "--max-new-tokens", 2)
    assert done.code == 7 and "logits are no numbers (NaN or inf)" in done.err
    assert len(done.err.splitlines()) == 1
