"""What the system may do to the command line: end it at any moment, close or fill its streams."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest

from exported import SHAPES, Run, command, files_of, in_process
from llm_coreml import pipeline
from llm_coreml.cli import process
from llm_coreml.cli.process import INTERRUPTION, Interruption, own_temporary_files
from llm_coreml.cli.tables import listing_table
from llm_coreml.cli.terminal import terminal
from llm_coreml.drafts import ENDING, draft_folder

pytestmark = pytest.mark.usefixtures("interruptible")
Export = Callable[[Callable[..., Any]], Run]


@pytest.fixture
def heeding(interruptible: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Heed signals as the command line's own process does."""
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")  # so that nothing is set
    before = {number: signal.getsignal(number) for number in ENDING}
    vars(INTERRUPTION).update(vars(Interruption()))
    process.begin()
    yield
    vars(INTERRUPTION).update(vars(Interruption()))
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def export(
    heeding: None,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> Export:
    """Return a function that runs the command `export` with another way to export."""

    def run(way: Callable[..., Any]) -> Run:
        monkeypatch.setattr(pipeline, "export", way)
        return in_process(capfd, monkeypatch, "export", "./x", "-o", tmp_path / "out", *SHAPES)

    return run


def interrupted(number: signal.Signals) -> tuple[int, str]:
    return 128 + number, "Interrupted; nothing was written."


@pytest.mark.parametrize("number", ENDING)
def test_an_error_that_a_library_makes_of_a_signal(export: Export, number: signal.Signals) -> None:
    def convert(*_: Any, **__: Any) -> NoReturn:
        try:
            signal.raise_signal(number)
        except KeyboardInterrupt:
            raise RuntimeError("callback failed") from None
        pytest.fail("nothing was raised")

    done = export(convert)
    assert (done.code, done.err.strip()) == interrupted(number)


def test_a_library_that_goes_on(export: Export) -> None:
    reached = []

    def swallow(*_: Any, progress: Any, **__: Any) -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        except BaseException:
            reached.append("caught")
        progress.stage("lower")
        reached.append("lower")

    done = export(swallow)
    assert (done.code, done.err.strip()) == interrupted(signal.SIGTERM)
    assert reached == ["caught"]


def test_pressing_it_again_does_not_stop_the_cleaning_up(export: Export, tmp_path: Path) -> None:
    def work(*_: Any, **__: Any) -> None:
        try:
            with draft_folder(tmp_path):
                signal.raise_signal(signal.SIGINT)
        finally:
            signal.raise_signal(signal.SIGINT)
            (tmp_path / "cleaned").touch()

    done = export(work)
    assert (done.code, done.err.strip()) == interrupted(signal.SIGINT)
    assert files_of(tmp_path) == {"cleaned"}


def test_a_last_moment_counts_as_done(export: Export, bundle: Path) -> None:
    def work(*_: Any, output: Path, **__: Any) -> None:
        shutil.copytree(bundle, output)
        signal.raise_signal(signal.SIGTERM)

    done = export(work)
    assert done.code == 0 and done.err == "" and "verified by" in done.out


def test_what_is_ignored_stays_so(heeding: None) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    process.begin()
    signal.raise_signal(signal.SIGHUP)
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_libraries_find_a_folder_for_temporary_files_that_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    (tmp_path / "llm-coreml-process-0").mkdir()  # of a process that was killed
    before = dict(os.environ)
    with own_temporary_files():
        from torch._inductor.runtime.cache_dir_utils import cache_dir

        (folder,) = tmp_path.iterdir()
        assert Path(tempfile.mkdtemp()).parent == folder and os.environ["TMPDIR"] == str(folder)
        assert Path(cache_dir()).parent == folder
    assert files_of(tmp_path) == set() and os.environ == before
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/mine")
    with own_temporary_files():
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/mine"


def test_no_place_for_temporary_files(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> NoReturn:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", refuse)
    with own_temporary_files():
        pass


def test_the_exit_code_is_ours_wherever_the_signal_came(tmp_path: Path) -> None:
    script = """
import os, signal, sys
from llm_coreml.cli import main, process
process.begin()
def work():
    exec("signal.raise_signal(signal.SIGTERM)")
main.cli.main = lambda **_: work()
try:
    main.main()
finally:
    process.end()
"""
    (tmp_path / "started.py").write_text(script)
    words = [sys.executable, "-m", "started"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr.strip()) == interrupted(signal.SIGTERM)


WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, ("PASSIVE", "0", "0")),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, ("ACTIVE", None, None)),
        ({"GOMP_SPINCOUNT": "7"}, (None, "7", None)),
    ],
)
def test_waiting_threads_sleep_unless_the_user_says_otherwise(
    given: dict[str, str], expected: tuple[str | None, ...]
) -> None:
    script = f"""
import os, sys
from llm_coreml.cli import process
process.begin()
assert "torch" not in sys.modules
print([os.environ.get(name) for name in {WAITING}])
"""
    kept = {name: value for name, value in os.environ.items() if name not in WAITING}
    words = [sys.executable, "-c", script]
    done = subprocess.run(words, env={**kept, **given}, capture_output=True, text=True)
    assert done.stdout.strip() == str(list(expected)), done.stderr


def test_an_ended_process_is_not_searched_for_garbage() -> None:
    script = """
import atexit, gc
from llm_coreml.cli import process
atexit.register(lambda: print(gc.isenabled(), gc.get_freeze_count() > 1000))
process.begin()
process.end()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "False True\n", done.stderr


def test_the_library_leaves_the_environment_alone() -> None:
    script = """
import os
before = dict(os.environ)
import llm_coreml.pipeline, llm_coreml.cli.main
assert not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "TMPDIR"} & (os.environ.keys() - before.keys())
"""
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)


@pytest.mark.parametrize("words", [("export", "llama"), ("show", "x"), ("ls",)])
def test_a_folder_that_is_gone(tmp_path: Path, words: tuple[str, ...]) -> None:
    script = 'cd "$0" && rmdir "$0" && exec "$@"'
    (tmp_path / "gone").mkdir()
    done = subprocess.run(
        ["sh", "-c", script, str(tmp_path / "gone"), *command(*words)],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("Error: The folder that this runs in is gone")


def test_errors_that_nobody_foresaw_are_sentences(export: Export) -> None:
    def ending(error: BaseException) -> str:
        def work(*_: Any, **__: Any) -> NoReturn:
            raise error

        done = export(work)
        assert done.code == 1 and done.out == "" and "Traceback" not in done.err
        (line,) = done.err.splitlines()
        assert line.isprintable()
        return line

    assert "memory is not enough" in ending(MemoryError())
    assert "an unexpected RecursionError" in ending(RecursionError("maximum depth"))
    assert "please report" in ending(AssertionError("\x1b[2J\n" * 1000))
    assert r"'\x1b' is a name that is no text" not in ending(ValueError("x"))
    told = ending(OSError(errno.ENAMETOOLONG, "File name too long", "x" * 9999))
    assert "File name too long" in told and len(told) < 1000 and "unexpected" not in told
    told = ending(UnicodeEncodeError("utf-8", "a\udcff", 1, 2, "surrogates not allowed"))
    assert r"'a\udcff' is a name that is no text" in told


@pytest.mark.parametrize("columns", ["0", "1", "-5", "abc", "9" * 30])
def test_any_number_of_columns(
    columns: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    with terminal(verbose=False) as screen:
        screen.show("human", {}, lambda: listing_table("title", {"name": "meaning"}))
    assert re.search(r"^name +meaning", capfd.readouterr().out, re.M)


# Streams


def shell(line: str, *words: str | Path) -> Run:
    """Run the command with its streams as `line` says."""
    words = ("sh", "-c", f'"$@" {line}', "sh", *command(*words))
    done = subprocess.run(words, capture_output=True, text=True)
    return Run(done.returncode, done.stdout, done.stderr)


FULL = "Error: {} No space left on device"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_streams(
    bundle: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    help_page = shell("> /dev/full", "--help")
    assert help_page.code == 1 and "No space left on device" in help_page.err
    assert len(help_page.err.splitlines()) == 1
    wrong = shell("2> /dev/full", "show")
    assert wrong == Run(2, "", "")


def test_a_full_stdout_is_an_error_and_a_full_stderr_is_none(tmp_path: Path) -> None:
    script = """
import os, sys
from llm_coreml.cli import main, terminal
import click

@click.command("try")
def command():
    with terminal.terminal(verbose=False) as screen:
        screen.progress.stage("open")
        screen.progress.note("told")
        screen.show("json", {"a": 1}, lambda: "a")

main.cli.add_command(command)
main.main()
"""
    begin = "from llm_coreml.cli import process; process.begin()\n"

    def run(line: str) -> Run:
        words = ("sh", "-c", f'"$@" {line}', "sh", sys.executable, "-c", begin + script, "try")
        done = subprocess.run(words, capture_output=True, text=True)
        return Run(done.returncode, done.stdout, done.stderr)

    result = '{\n  "a": 1\n}\n'
    assert run("") == Run(0, result, run("> /dev/null").err)
    if Path("/dev/full").exists():
        done = run("> /dev/full")
        assert done.code == 6 and "The result cannot be printed: No space left" in done.err
        assert "Traceback" not in done.err and "ignored" not in done.err
        assert run("2> /dev/full") == Run(0, result, "")
    assert run("2>&-") == Run(0, result, "")
    assert run(">&-").code == 0
    assert run("<&- >&- 2>&-") == Run(0, "", "")
    assert run("| true").err == run("").err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_text_that_is_shown_as_it_comes_and_cannot_be_shown() -> None:
    script = """
from llm_coreml.cli import main, process, terminal
import click

@click.command("try")
def command():
    with terminal.terminal(verbose=False) as screen:
        screen.result.file.write("text")
        screen.result.file.flush()

process.begin()
main.cli.add_command(command)
main.main()
"""
    words = ("sh", "-c", '"$@" > /dev/full', "sh", sys.executable, "-c", script, "try")
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 6 and "The result cannot be printed: No space left" in done.stderr


def test_output_of_a_closed_stream_is_no_file_of_ours(tmp_path: Path) -> None:
    """A file that gets the number of stdout would get all that is printed there."""
    script = """
import os, sys
from llm_coreml.cli import process
process.begin()
with open(sys.argv[1], "w") as file:
    os.write(1, b"printed")
    os.write(2, b"printed")
    print("printed")
    file.write("mine")
"""
    path = tmp_path / "model.pte"
    words = ("sh", "-c", '"$@" >&- 2>&-', "sh", sys.executable, "-c", script, str(path))
    assert subprocess.run(words).returncode == 0
    assert path.read_text() == "mine"


BLOCKED = """
from pathlib import Path
from llm_coreml.cli import main, process
process.begin()
from llm_coreml.cli import terminal
import click

@click.command("{what}")
def command():
    with terminal.terminal(verbose=False) as screen:
        Path("{begun}").touch()
        if "{what}" == "notes":
            screen.progress.stage("open")
        elif "{what}" == "stream":
            while True:
                screen.result.file.write("text")
                screen.result.file.flush()
        screen.show("json", {{"a": "b" * 10**6}}, lambda: "a")

main.cli.add_command(command)
if "{what}" == "--help":
    Path("{begun}").touch()
try:
    main.main()
finally:
    process.end()
"""


def full_pipe() -> tuple[int, int]:
    """A pipe into which nothing more goes until somebody reads."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(write, b"x")
    os.set_blocking(write, True)
    return read, write


@pytest.mark.parametrize(
    ("what", "number"),
    [
        ("result", signal.SIGTERM),
        ("result", signal.SIGINT),
        ("stream", signal.SIGTERM),
        ("notes", signal.SIGTERM),
        ("--help", signal.SIGTERM),
    ],
)
def test_a_signal_ends_what_nobody_reads(what: str, number: signal.Signals, tmp_path: Path) -> None:
    read, write = full_pipe()
    temporary, begun = tmp_path / "temporary", tmp_path / "begun"
    temporary.mkdir()
    started = subprocess.Popen(
        [sys.executable, "-c", BLOCKED.format(what=what, begun=begun), what],
        stdout=write,
        stderr=write,
        env={**os.environ, "TMPDIR": str(temporary)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        deadline = time.monotonic() + 60
        while not begun.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.5)
        assert started.poll() is None
        started.send_signal(number)
        assert started.wait(timeout=30) == 128 + number
        assert files_of(temporary) == set()
    finally:
        started.kill()
        os.close(read)
        os.close(write)


def test_a_slow_reader_gets_all_that_is_done(tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    started = subprocess.Popen(
        [sys.executable, "-c", BLOCKED.format(what="result", begun=begun), "result"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    while not begun.exists():
        time.sleep(0.01)
    time.sleep(0.5)
    started.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    out, err = started.communicate(timeout=30)
    assert (started.returncode, err) == (0, b"")
    assert json.loads(out) == {"a": "b" * 10**6}
