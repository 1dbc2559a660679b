"""Runs a bundle by the runner in C++, and reads what it printed.

asked = CppRequest(tokens, max_new_tokens=64, sampling=GREEDY)
run = run_cpp(open_bundle(Path("twin")), asked)
run.ids, run.tokens_per_second
"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llm_coreml.bundle.folder import Bundle
from llm_coreml.cpp.cmake_build import built_runner
from llm_coreml.cpp.device_run import DeviceRun, parse_device_run
from llm_coreml.errors import ArtifactError, ConfigError, LlmCoreMLError, OutputError
from llm_coreml.progress import Progress
from llm_coreml.quiet import is_loud
from llm_coreml.runtime.sampling import GREEDY, Sampling

# The runner's codes are those of these errors.
_ERRORS = {kind.exit_code: kind for kind in (ConfigError, OutputError, ArtifactError)}


@dataclass(frozen=True)
class CppRequest:
    """What is to be generated.

    Attributes:
        tokens: The prompt.
        max_new_tokens: Most tokens to add.
        sampling: How they are chosen; a seed draws other tokens than in Python.
        stop: Tokens that end the text, beside the bundle's own.
        runs: How often it is done and timed, from a reset each time.
        warm_up: How often it is done before that.
    """

    tokens: Sequence[int]
    max_new_tokens: int
    sampling: Sampling = GREEDY
    stop: Sequence[int] = ()
    runs: int = 1
    warm_up: int = 0

    def words(self) -> list[str]:
        """Return the request as options of the runner, but for the prompt."""
        sampling = self.sampling
        words = {
            "--max-new-tokens": self.max_new_tokens,
            "--temperature": sampling.temperature,
            "--top-p": sampling.top_p,
            "--seed": sampling.seed,
            "--runs": self.runs,
            "--warm-up": self.warm_up,
        }
        stop = ["--stop", ",".join(map(str, self.stop))] if self.stop else []
        return [text for pair in words.items() for text in map(str, pair)] + stop


def check_runs_here(bundle: Bundle) -> None:
    """Refuse a program for Core ML where there is none.

    Raises:
        ConfigError: as said.
    """
    if bundle.manifest.target.backend == "coreml" and sys.platform != "darwin":
        raise ConfigError(
            f"'{bundle.folder}' is lowered for Core ML, which the C++ runner finds on macOS alone; "
            "export with --backend xnnpack for its twin, or leave out --runtime cpp."
        )


def run_cpp(bundle: Bundle, asked: CppRequest, progress: Progress | None = None) -> DeviceRun:
    """Run the program of a bundle on ExecuTorch, in a process of its own.

    Args:
        bundle: What to run.
        asked: The prompt, and what to make of it.
        progress: Told if the runner is built first.

    Raises:
        ArtifactError: the program is damaged.
        ConfigError: it is for Core ML and this is no Mac, the prompt does not fit, or the runner
            cannot be built.
        OutputError: there is no place to build it in.
    """
    return parsed_run(finished_run(bundle, asked, progress), bundle.program)


def finished_run(bundle: Bundle, asked: CppRequest, progress: Progress | None = None) -> bytes:
    """Return what the runner printed; arguments and errors as `run_cpp`."""
    check_runs_here(bundle)
    binary = built_runner(progress)
    command = [str(binary), str(bundle.folder.resolve()), *asked.words()]
    command += ["--verbose"] if is_loud() else []
    try:
        done = subprocess.run(
            command,
            input=" ".join(map(str, asked.tokens)).encode(),
            capture_output=True,
            check=False,
        )
    except OSError as error:
        raise ConfigError(
            f"The runner '{binary}' cannot be started: {error.strerror}. Remove it, so that it is "
            "built again."
        ) from None
    if is_loud():
        sys.stderr.buffer.write(done.stderr)
    if done.returncode != 0:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        kind = _ERRORS.get(done.returncode, LlmCoreMLError)
        raise kind(said[-1] if said else _ended(done.returncode))
    return done.stdout


def _ended(code: int) -> str:
    """Say how a runner ended that said nothing itself."""
    if code >= 0:
        return f"The runner ended with code {code}; --verbose shows what ExecuTorch says."
    known = {each.value: each.name for each in signal.Signals}
    return (
        f"The runner was ended by the system ({known.get(-code, code)}), most likely for want of "
        "memory; close other programs, or export with fewer bits or a shorter --context."
    )


def parsed_run(printed: bytes, program: Path) -> DeviceRun:
    """Return what the runner printed, typed.

    Raises:
        ArtifactError: it is no report: the program has made something else of the process.
    """
    try:
        return parse_device_run(printed)
    except ValueError as error:
        raise ArtifactError(
            f"'{program}' made the runner print something else than a report ({error}); export it "
            "again."
        ) from None
