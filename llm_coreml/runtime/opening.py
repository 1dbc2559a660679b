"""The runner that fits an artifact on this machine.

runner = open_runner(open_bundle(Path("out")))
"""

from __future__ import annotations

from pathlib import Path

from llm_coreml.bundle.folder import Bundle, check_program
from llm_coreml.errors import ConfigError
from llm_coreml.reference.program.execution import Execution
from llm_coreml.runtime.executorch import ExecutorchRunner
from llm_coreml.runtime.reference import DECLARED, ReferenceRunner
from llm_coreml.runtime.runner import Runner


def open_runner(bundle: Bundle, execution: Execution = DECLARED) -> Runner:
    """Return the runner for a bundle's program on this machine.

    Raises:
        ArtifactError: the program is damaged, or contradicts the manifest.
        ConfigError: the execution asks for what is not there.
    """
    backend = bundle.manifest["target"]["backend"]
    if backend != "coreml":
        if execution != DECLARED:
            raise ConfigError(
                f"'{bundle.folder}' is lowered for {backend}, whose runtime has no choice of mode "
                "or device; leave both out, or export with --backend coreml."
            )
        # ExecuTorch trusts what it loads.
        check_program(bundle)
        lengths = tuple(bundle.manifest["program"]["seq_lengths"])
        return ExecutorchRunner(bundle.program, lengths)
    return ReferenceRunner(bundle.program, execution)


def program_runner(
    path: Path, backend: str, seq_lengths: tuple[int, ...], execution: Execution
) -> Runner:
    """Return the runner for the program at `path`, lowered for `backend`.

    Args:
        path: The `.pte`.
        backend: `coreml`, or `xnnpack`, whose runtime has no choice of `execution`.
        seq_lengths: Chunk lengths that it accepts.
        execution: Numerics, device and memory.

    Raises:
        ArtifactError: the program is damaged.
    """
    if backend == "coreml":
        return ReferenceRunner(path, execution)
    return ExecutorchRunner(path, seq_lengths)
