"""A system without what only POSIX has is told in a sentence, before a module is missed."""

from __future__ import annotations

import subprocess
import sys

import pytest

WITHOUT = "import sys; sys.modules[{missing!r}] = None; sys.platform = {platform!r}; "
COMMAND = "sys.argv = ['llm-coreml', 'ls']; from llm_coreml.cli.__main__ import run; run()"
LIBRARY = """
import llm_coreml
try:
    llm_coreml.export
except llm_coreml.LlmCoreMLError as error:
    print(f"Error: {error}", file=sys.stderr)
    sys.exit(error.exit_code)
"""


@pytest.mark.parametrize("script", [COMMAND, LIBRARY], ids=["command", "library"])
@pytest.mark.parametrize(
    ("missing", "platform", "told"),
    [
        ("fcntl", "win32", "one for 'win32'; install it in WSL (`wsl --install`, then pip in"),
        ("resource", "emscripten", "one for 'emscripten'; use one of these."),
    ],
)
def test_another_system_is_refused(missing: str, platform: str, told: str, script: str) -> None:
    code = WITHOUT.format(missing=missing, platform=platform) + script
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (9, ""), done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("Error: llm-coreml runs on Linux and macOS") and told in line


def test_this_system_is_fit() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import sys; " + COMMAND], capture_output=True, text=True
    )
    assert done.returncode == 0 and "recipes" in done.stdout.lower()
