"""An export from Python says nothing of its own accord, and leaves the host program as it was."""

from __future__ import annotations

import logging
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from llm_coreml.quiet import no_bars, quiet

# A program of somebody else's, which logs and warns itself, before, inside and afterwards.
_HOST = """
import logging, sys, warnings
import llm_coreml

logging.getLogger("host").addHandler(logging.StreamHandler(sys.stdout))
class Host:
    def stage(self, name):
        warnings.warn("a warning of the host", stacklevel=1)
        logging.getLogger("host").warning("a line of the host")
    def advance(self, share): pass
    def note(self, text): pass
model, output = sys.argv[1:]
llm_coreml.export, llm_coreml.load  # torch and numpy choose filters when they are loaded
state = lambda: (list(warnings.filters), list(logging.root.handlers), list(logging.root.filters),
                 logging.root.level, logging.getLogger("torch").level)
before = state()
bundle = llm_coreml.export(model, output=output, context=64, progress=Host(), cache=False,
                           config=llm_coreml.ExportConfig(seq_lengths=(1, 8)))
llm_coreml.load(output).generate("The", 1)
print(bundle)
assert state() == before, (state(), before)
"""


def test_an_export_from_python_is_quiet(checkpoint: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-c", _HOST, str(checkpoint), str(tmp_path / "out")]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told, shown = done.stdout.splitlines()[:5], done.stdout.splitlines()[5:]
    assert set(told) == {"a line of the host"}
    assert shown[0].startswith(f"{tmp_path / 'out'}: ") and len(shown) == 6
    lines = {line for line in done.stderr.splitlines() if "a warning of the host" not in line}
    assert (
        lines == {"  warnings.warn" + '("a warning of the host", stacklevel=1)'} or lines == set()
    )


def test_what_the_libraries_say_is_dropped(caplog: pytest.LogCaptureFixture) -> None:
    handlers, filters = list(logging.root.handlers), list(warnings.filters)
    below = logging.getLogger("torch.some.part")
    below.setLevel(logging.INFO)
    with quiet():
        logging.getLogger("coremltools").error("theirs")
        logging.getLogger("torchao.new").error("theirs")
        below.error("theirs")
        logging.getLogger("llm").error("mine")
        logging.root.addHandler(logging.NullHandler())
        warnings.warn_explicit("theirs", UserWarning, "x.py", 1, module="executorch.exir")
        with pytest.warns(UserWarning, match="mine"):
            warnings.warn("mine", stacklevel=1)
    assert [record.message for record in caplog.records] == ["mine"]
    assert logging.root.handlers == handlers and warnings.filters == filters
    assert below.level == logging.INFO and not logging.root.filters
    logging.getLogger("coremltools").error("again")
    assert caplog.records[-1].message == "again"


def test_a_host_in_a_folder_called_as_a_library_is_heard(caplog: pytest.LogCaptureFixture) -> None:
    """Both ask the root logger; a log line tells the file alone."""
    torch = Path(sys.modules["torch"].__path__[0])
    with quiet():
        for path in (Path("/home/me/torch/train.py"), torch / "_logging.py"):
            code = compile("logging.warning('from ' + __file__)", str(path), "exec")
            exec(code, {"logging": logging, "__file__": str(path)})
    assert [record.pathname for record in caplog.records] == ["/home/me/torch/train.py"]


def test_bars_of_coremltools_are_back_afterwards(capfd: pytest.CaptureFixture[str]) -> None:
    from coremltools.converters.mil.mil.passes import pass_pipeline

    bar = pass_pipeline.tqdm
    with pytest.raises(KeyboardInterrupt), no_bars():
        assert list(pass_pipeline.tqdm(range(3))) == [0, 1, 2]
        raise KeyboardInterrupt
    assert capfd.readouterr().err == "" and pass_pipeline.tqdm is bar


def test_lines_of_the_host_go_where_they_went(capfd: pytest.CaptureFixture[str]) -> None:
    root = list(logging.root.handlers)
    logging.root.handlers[:] = []
    own, plain = logging.getLogger("host.own"), logging.getLogger("host.plain")
    own.addHandler(logging.NullHandler())
    try:
        with quiet():
            logging.warning("a library asks the root logger")
            own.warning("handled by its own")
            plain.warning("handled by nobody")
            plain.info("too low")
        assert logging.root.handlers == []
    finally:
        logging.root.handlers[:] = root
        own.handlers.clear()
    told = capfd.readouterr().err.splitlines()
    assert told == ["a library asks the root logger", "handled by nobody"]
