"""Windows in parallel, after an interruption, and read before: the same figures bit by bit."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fake_runner import FakeRunner
from llm_coreml.decoder import Decoder
from llm_coreml.eval import cores
from llm_coreml.eval.cores import Share, share
from llm_coreml.eval.finished import FinishedWindows
from llm_coreml.eval.heldout import HeldOut
from llm_coreml.eval.kept import Kept
from llm_coreml.eval.measurable import Measurable
from llm_coreml.eval.metrics import METRICS, Metric
from llm_coreml.eval.quality import measure_quality
from llm_coreml.eval.remembered import RememberedReader
from llm_coreml.eval.results import Quality, Subject, Window
from llm_coreml.eval.scoring import Scoring
from llm_coreml.eval.workers import computing_with, in_parallel
from llm_coreml.model import open_model
from llm_coreml.progress import Silent
from llm_coreml.quantize.quantized import build_original
from llm_coreml.reference.program.execution import Execution
from llm_coreml.runtime.eager import EagerRunner
from tiny import llama, save

WINDOWS = ((0, 1, 2, 3, 4, 5), (6, 5, 4, 2, 2), (1, 0, 6, 6, 3), (2, 4, 6, 1), (3, 3, 5))
SIZES = tuple(Window(len(each) - 1, 2, 9) for each in WINDOWS)
READ = HeldOut("text", "0" * 64, WINDOWS, SIZES)
FACTS = {"source": "1" * 64, "program": "2" * 64}
VOCABULARY, HIDDEN = 97, 64
TABLE = torch.randn(7, 7, generator=torch.Generator().manual_seed(3))


Found = list[dict[str, Any]]


def fake() -> dict[str, FakeRunner]:
    other = TABLE + 0.3 * torch.randn(7, 7, generator=torch.Generator().manual_seed(4))
    return {"original": FakeRunner(TABLE), "artifact": FakeRunner(other)}


def figures(found: tuple[Quality, ...]) -> Found:
    return [each.to_json() for each in found]


def test_windows_in_processes_give_what_they_give_one_by_one() -> None:
    serial = measure_quality(fake(), WINDOWS, sizes=SIZES)
    shares: list[float] = []
    parallel = measure_quality(fake(), WINDOWS, shares.append, sizes=SIZES, share=Share(3, 1))
    assert figures(parallel) == figures(serial)
    assert shares == [pytest.approx(part / 5) for part in range(1, 6)]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_is_named_from_another_process(value: float) -> None:
    broken = TABLE.clone()
    broken[6, 3] = value
    runners = {"original": FakeRunner(TABLE), "artifact": FakeRunner(broken)}
    original, artifact = measure_quality(runners, WINDOWS, sizes=SIZES, share=Share(3, 1))
    assert original.figures and not artifact.figures and artifact.measures is not None
    found = artifact.measures.not_finite
    assert found is not None and (found.rows, found.window, found.position, found.token) == (
        4,
        1,
        0,
        6,
    )


def test_what_a_process_cannot_do_is_done_here(tmp_path: Path) -> None:
    here, threads = os.getpid(), torch.get_num_threads()

    def work(number: int) -> bytes:
        if os.getpid() != here:
            if number == 1:
                raise ValueError("out of memory")
            if number == 2:
                os.kill(os.getpid(), signal.SIGKILL)
        return f"{number} {os.getpid() == here} {torch.get_num_threads()}".encode()

    found = dict(in_parallel(work, range(6), jobs=2, threads=threads + 1))
    assert sorted(found) == list(range(6))
    told = {number: data.decode().split() for number, data in found.items()}
    assert told[1][1] == told[2][1] == "True" and told[0][1] == "False"
    assert {threads for _, _, threads in told.values()} == {str(threads + 1)}
    assert torch.get_num_threads() == threads

    def fails(number: int) -> bytes:
        raise ValueError(f"window {number}")

    with pytest.raises(ValueError, match=r"window [01]"):
        list(in_parallel(fails, range(3), jobs=2, threads=1))


def test_a_process_computes_with_several_threads() -> None:
    """OpenMP's threads are not there after a fork, and whoever had used them waits for them."""
    numbers = torch.arange(1 << 20, dtype=torch.float64)

    def work(_: int) -> bytes:
        return str(float(numbers.sqrt().sum())).encode()

    def late(_: int, __: Any) -> None:
        raise TimeoutError("a process hangs")

    with computing_with(2):
        expected = work(0)  # by threads of this process, which it keeps
    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(60)
    try:
        assert dict(in_parallel(work, range(2), jobs=2, threads=2)) == {0: expected, 1: expected}
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def test_processes_are_gone_when_nobody_asks_any_more() -> None:
    def work(number: int) -> bytes:
        return str(os.getpid()).encode()

    running = in_parallel(work, range(100), jobs=2, threads=1)
    process = int(next(running)[1])
    assert process != os.getpid()
    running.close()  # type: ignore[attr-defined]
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)


def test_an_interrupted_evaluation_goes_on_from_what_was_scored(tmp_path: Path) -> None:
    whole = measure_quality(fake(), WINDOWS, sizes=SIZES)

    def stop(share: float) -> None:
        if share > 0.5:
            raise KeyboardInterrupt

    finished = FinishedWindows(Kept(tmp_path), FACTS)
    with pytest.raises(KeyboardInterrupt):
        measure_quality(fake(), WINDOWS, stop, sizes=SIZES, finished=finished)
    # One of the three is damaged, and another's bytes are no scores.
    broken, other, _ = sorted(tmp_path.iterdir())
    broken.write_bytes(broken.read_bytes()[:-1])
    Kept(tmp_path).store(other.stem, b"no scores")
    runners, notes = fake(), list[str]()
    again = FinishedWindows(Kept(tmp_path), FACTS)
    shares: list[float] = []
    resumed = measure_quality(
        runners, WINDOWS, shares.append, sizes=SIZES, finished=again, note=notes.append
    )
    assert figures(resumed) == figures(whole)
    assert runners["artifact"].resets == 4 and shares == [0.25, 0.5, 0.75, 1.0]
    assert notes == ["1 of 5 windows were scored before, and are not read again."]
    # Of another program nothing is known.
    runners = fake()
    changed = FinishedWindows(Kept(tmp_path), {**FACTS, "program": "3" * 64})
    measure_quality(runners, WINDOWS, finished=changed)
    assert runners["artifact"].resets == len(WINDOWS)
    changed.forget()
    again.forget()
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    return build_original(open_model(save(llama(), tmp_path_factory.mktemp("model"))), 32)


def test_an_original_reads_a_text_once(
    decoder: Decoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner, kept, tokens = EagerRunner(decoder, "eager"), Kept(tmp_path), [1, 4, 2, 9, 0]
    reader = RememberedReader(runner, "1" * 64, kept, threads=1)
    expected = runner.logits(tokens)
    assert torch.equal(reader.logits(tokens), expected)
    (entry,) = tmp_path.iterdir()
    assert entry.stat().st_size == 32 + 4 * len(tokens) * HIDDEN
    monkeypatch.setattr(EagerRunner, "hidden", None)
    assert torch.equal(reader.logits(tokens), expected)
    for other in (
        RememberedReader(runner, "2" * 64, kept, threads=1),
        RememberedReader(runner, "1" * 64, kept, threads=2),
    ):
        with pytest.raises(TypeError):
            other.logits(tokens)
    with pytest.raises(TypeError):
        reader.logits(tokens[:-1])
    entry.write_bytes(entry.read_bytes()[:-4] + bytes(4))
    with pytest.raises(TypeError):
        reader.logits(tokens)


def test_a_folder_is_bounded_and_one_that_takes_nothing_is_done_without(tmp_path: Path) -> None:
    kept = Kept(tmp_path / "own")
    keys = [f"{number:064x}" for number in range(4)]
    for age, key in enumerate(keys):
        assert kept.store(key, bytes(68))
        os.utime(tmp_path / "own" / f"{key}.kept", (age, age))
    (tmp_path / "own" / "mine.txt").write_text("stays")
    assert kept.load(keys[0]) == bytes(68)  # and is now the one that was used last
    bounded = Kept(tmp_path / "own", largest=250)
    assert [bounded.load(key) is not None for key in keys] == [True, False, False, True]
    assert (tmp_path / "own" / "mine.txt").exists()
    (tmp_path / "file").write_text("")
    notes: list[str] = []
    nowhere = Kept(tmp_path / "file" / "below", notes.append)
    assert notes == [text for text in notes if "cannot be written" in text] != []
    assert not nowhere.store(keys[0], b"x") and nowhere.load(keys[0]) is None


def test_cores_are_shared_by_text_and_machine_alone(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = EagerRunner(decoder, "eager")
    monkeypatch.setattr(cores.torch, "get_num_threads", lambda: 8)
    assert share([runner], WINDOWS) == Share(5, 1)
    assert share([runner], WINDOWS[:2]) == Share(2, 4)
    assert share([runner], WINDOWS[:2], jobs=1) == Share(1, 4)
    assert share([runner], WINDOWS, jobs=3) == Share(3, 1)
    monkeypatch.setattr(cores, "machine_memory", lambda: 2 * 2 * 4 * 4 * VOCABULARY * 6)
    assert share([runner], WINDOWS) == Share(2, 1)
    # ExecuTorch has threads of its own, and so has a GPU.
    assert share([runner, FakeRunner(TABLE)], WINDOWS) == Share(1, 8)
    assert share([runner], WINDOWS, device="cuda") == Share(1, 8)


def test_scoring_remembers_and_forgets(decoder: Decoder, tmp_path: Path) -> None:
    def measured(metrics: tuple[Metric, ...] = METRICS, jobs: int | None = None) -> Found:
        artifact, notes = FakeRunner(torch.randn(VOCABULARY, VOCABULARY)), Notes()
        scoring = Scoring(READ, metrics, Kept(tmp_path), jobs, Execution())
        others, subject = {"original": EagerRunner(decoder, "x")}, Subject("pte", "a", "2" * 64)
        opened = Measurable(subject, artifact, 0.1, None, lambda: (others, "1"), FACTS, {}, 0)
        found = scoring.measure(opened, notes)
        kept.append(len(list(tmp_path.iterdir())))
        scoring.forget()
        kept.append(len(list(tmp_path.iterdir())))
        told.extend(notes.told)
        return figures(found)

    kept: list[int] = []
    told: list[str] = []
    torch.manual_seed(1)
    first = measured()
    # What the original gives stays; the scores of windows go, or a new run would not measure.
    assert kept == [10, 5]
    torch.manual_seed(1)
    assert measured() == first
    assert first[0]["noise_floor"]["tokens"] == 9 and "noise_floor" not in first[1]
    # What a metric of somebody else's does nobody knows, so that nothing is kept of it.
    measured(metrics=(*METRICS, replace(METRICS[0], name="own")), jobs=2)
    assert kept[4:] == [5, 5]
    assert [text for text in told if "one after the other" in text]


class Notes(Silent):
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def note(self, text: str) -> None:
        self.told.append(text)
