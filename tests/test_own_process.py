"""Python in a process of its own: found where this one finds it, and bounded."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from llm_coreml.own_process import python_command


def run(
    module: str, function: str, *arguments: int | str, cwd: Path
) -> subprocess.CompletedProcess[str]:
    command = python_command(module, function, *arguments)
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd)


def test_it_takes_nothing_from_the_current_folder(tmp_path: Path) -> None:
    (tmp_path / "json.py").write_text("raise SystemExit('a module of the folder')")
    done = run("json", "dumps", "a\n'b'", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("bound", ["bound_memory(1 << 30)", "bound_further_memory(100 << 20)"])
@pytest.mark.skipif(sys.platform != "linux", reason="other systems bound nothing")
def test_memory_ends_at_the_bound(bound: str, tmp_path: Path) -> None:
    (tmp_path / "work.py").write_text(
        "from llm_coreml.own_process import *\n"
        f"def work(size):\n    {bound}\n    print(len(bytearray(size)))\n"
    )
    sys.path.append(str(tmp_path))
    try:
        few = run("work", "work", 10 << 20, cwd=tmp_path)
        many = run("work", "work", 2 << 30, cwd=tmp_path)
    finally:
        sys.path.remove(str(tmp_path))
    assert few.stdout.strip() == str(10 << 20), few.stderr
    assert many.returncode and "MemoryError" in many.stderr


def test_a_process_that_waits_for_the_end_of_stdin_can_be_forked(tmp_path: Path) -> None:
    (tmp_path / "waits.py").write_text(
        "import multiprocessing, os, time\n"
        "from llm_coreml.own_process import at_end_of_stdin\n"
        "def work():\n"
        "    at_end_of_stdin(lambda: os._exit(7))\n"
        "    time.sleep(0.2)\n"
        "    child = multiprocessing.get_context('fork').Process(target=print, args=('here',))\n"
        "    child.start()\n"
        "    child.join()\n"
        "    print('done', flush=True)\n"
        "    time.sleep(60)\n"
    )
    command = [sys.executable, "-c", "from waits import work; work()"]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        start_new_session=True,
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        killer = threading.Timer(30, os.killpg, (process.pid, signal.SIGKILL))
        killer.start()
        found = [process.stdout.readline(), process.stdout.readline()]
        process.stdin.close()
        code = process.wait()
        killer.cancel()
    assert found == ["here\n", "done\n"] and code == 7
