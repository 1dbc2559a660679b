"""Cells in processes of their own, here and on a Ray cluster: each way in which one can end."""

from __future__ import annotations

import builtins
import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import BuiltinFunctionType

import pytest

from llm_coreml.eval.sweep import attempt as attempting
from llm_coreml.eval.sweep.attempt import attempt
from llm_coreml.eval.sweep.local_engine import run_here
from llm_coreml.eval.sweep.ray_engine import run_on_ray
from llm_coreml.eval.sweep.task import Outcome, Task
from stub_cells import ENTRY


def task(folder: Path, word: str, label: str = "", **settings: float) -> Task:
    return Task(
        key=label or word,
        label=label or word,
        slug=label or word,
        model=word,
        settings={},
        measured={},
        weights="",
        tool="",
        folder=str(folder),
        entry=ENTRY,
        **settings,  # type: ignore[arg-type]
    )


def tries(folder: Path) -> list[tuple[str, int, int]]:
    """Return the label, process and parent of each try."""
    lines = (folder / "tries.jsonl").read_text().splitlines()
    return [tuple(json.loads(line)) for line in lines]


def wait_until(found: Callable[[], bool], seconds: float = 60.0) -> None:
    until = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < until
        time.sleep(0.02)


def is_alive(process: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, 0)
        state = Path(f"/proc/{process}/stat")
        return not state.exists() or state.read_text().rsplit(")", 1)[1].split()[0] != "Z"
    return False


def tried(folder: Path, word: str, **settings: float) -> Outcome:
    found = attempt(task(folder, word, **settings), lambda _: None, threading.Event())
    assert found is not None
    return found


def test_every_end_of_a_process_is_an_outcome(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[float] = []
    done = attempt(task(tmp_path, "slow0.1"), heard.append, threading.Event())
    assert done is not None and done.state == "done" and heard == [0.5]
    assert done.document is not None and done.document["subject"]["name"] == "slow0.1"
    assert done.seconds >= 0.1 and done.peak_memory_bytes == 1
    refused = tried(tmp_path, "refused")
    assert (refused.state, refused.sentence, refused.exit_code) == ("failed", "It is refused.", 5)
    crash = tried(tmp_path, "crash")
    assert (crash.sentence, crash.exit_code) == ("It crashed with signal 11.", 139)
    killed = tried(tmp_path, "killed")
    assert "short of memory; set fewer --jobs" in killed.sentence and killed.exit_code == 137
    ended = tried(tmp_path, "exit")
    assert (ended.sentence, ended.exit_code) == ("It ended with code 1 (the last words).", 1)
    (tmp_path / ".llm-coreml-0123").mkdir()
    late = tried(tmp_path, "hang", seconds=0.6)
    assert "was not done after 0.01 minutes" in late.sentence and "0.02}" in late.sentence
    assert not (tmp_path / ".llm-coreml-0123").exists(), "the draft of a killed process"
    assert late.exit_code == 128 + signal.SIGXCPU and late.seconds < 10
    monkeypatch.setattr(attempting, "_GRACE", 0.3)
    assert "was not done after" in tried(tmp_path, "deaf", seconds=0.6).sentence
    assert not any(is_alive(process) for _, process, _ in tries(tmp_path))


def test_cells_run_at_once_and_end_with_whoever_asked(tmp_path: Path) -> None:
    tasks = [task(tmp_path, "slow0.3", str(number)) for number in range(4)]
    begun = time.monotonic()
    found = [each for each in run_here(tasks, 4, lambda _, __: None) if each is not None]
    assert {each.label for each, _ in found} == {"0", "1", "2", "3"}
    assert all(outcome.state == "done" for _, outcome in found)
    assert time.monotonic() - begun < 4 * 0.3 + 5
    (tmp_path / "tries.jsonl").unlink()
    running = run_here([task(tmp_path, "hang", str(n)) for n in range(3)], 2, lambda _, __: None)
    assert next(running) is None
    wait_until((tmp_path / "tries.jsonl").exists)
    wait_until(lambda: len(tries(tmp_path)) == 2)
    running.close()
    assert not any(is_alive(process) for _, process, _ in tries(tmp_path))
    assert len(tries(tmp_path)) == 2, "the third was not begun"


def test_a_mistake_of_ours_ends_the_sweep(tmp_path: Path) -> None:
    wrong = replace(task(tmp_path, "slow0"), entry=("stub_cells",))  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        list(run_here([wrong], 1, lambda _, __: None))


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A Ray cluster of two nodes with a core each, and its address."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    helpers = str(Path(__file__).parents[2] / "helpers")
    monkeypatch.setenv("PYTHONPATH", helpers)
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    small = {"num_cpus": 1, "object_store_memory": 80 << 20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=small)
    try:
        cluster.add_node(num_cpus=1, object_store_memory=80 << 20)
        yield str(cluster.address)
    finally:
        ray.shutdown()
        cluster.shutdown()


def test_a_worker_of_a_cluster_that_is_killed_loses_nothing(tmp_path: Path, cluster: str) -> None:
    tasks = [task(tmp_path, "slow2", str(number)) for number in range(4)]
    tasks.append(task(tmp_path, "refused"))

    def kill_a_worker() -> None:
        wait_until((tmp_path / "tries.jsonl").exists)
        os.kill(tries(tmp_path)[0][2], signal.SIGKILL)

    killer = threading.Thread(target=kill_a_worker)
    killer.start()
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    found = {each[0].label: each[1] for each in run_on_ray(tasks, cluster, _nothing) if each}
    killer.join()
    assert {label: outcome.state for label, outcome in found.items()} == {
        **dict.fromkeys("0123", "done"),
        "refused": "failed",
    }
    assert found["refused"].exit_code == 5
    begun = tries(tmp_path)
    first = begun[0]
    assert [label for label, _, _ in begun].count(first[0]) == 2, "the killed one's cell, again"
    assert len(begun) == len(tasks) + 1 and len({parent for _, _, parent in begun}) >= 2
    assert not any(is_alive(process) for _, process, _ in begun)
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert type(builtins.print) is BuiltinFunctionType


def _nothing(_: Task, __: float) -> None:
    """Hear nothing."""
