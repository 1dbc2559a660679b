"""The runner that fits a program on this machine.

runner = program_runner(Path("out/model.pte"), description, Execution())
"""

from __future__ import annotations

from pathlib import Path

from llm_coreml.artifact.description import Description
from llm_coreml.reference.program.execution import Execution
from llm_coreml.runtime.executorch import ExecutorchRunner
from llm_coreml.runtime.reference import ReferenceRunner
from llm_coreml.runtime.runner import Runner
from llm_coreml.targets import BACKENDS


def program_runner(path: Path, description: Description, execution: Execution) -> Runner:
    """Return the runner for the program at `path`.

    Args:
        path: The `.pte`, which this process has written: ExecuTorch runs it here, and trusts it.
        description: What it offers, and to which runtime.
        execution: Numerics, device and memory; XNNPACK has no choice of them.

    Raises:
        ArtifactError: the program is damaged, or contradicts its description.
        ConfigError: the execution asks for what is not there.
    """
    if BACKENDS[description.backend].runtime == "reference":
        return ReferenceRunner(path, execution, description)
    return ExecutorchRunner(path, description)
