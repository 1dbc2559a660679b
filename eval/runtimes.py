"""What runs an export that is evaluated: the reference runtime, or ExecuTorch's own.

runner = bundle_runner(bundle, "auto", Execution())
"""

from __future__ import annotations

import platform
from pathlib import Path

from llm_coreml.artifact.description import Description
from llm_coreml.bundle.bundle_runner import open_runner
from llm_coreml.bundle.folder import Bundle
from llm_coreml.errors import ConfigError, SystemUnfitError
from llm_coreml.reference.program.execution import Execution
from llm_coreml.runtime.executorch import ExecutorchRunner
from llm_coreml.runtime.reference import DECLARED, ReferenceRunner
from llm_coreml.runtime.runner import Runner
from llm_coreml.targets import BACKENDS

AUTO, REFERENCE, EXECUTORCH, EAGER = "auto", "reference", "executorch", "eager"
RUNTIMES = (AUTO, REFERENCE, EXECUTORCH, EAGER)
_CORE_ML = "Core ML, run by ExecuTorch on macOS"


def bundle_runner(bundle: Bundle, runtime: str, execution: Execution) -> Runner:
    """Return what runs a bundle's program.

    Args:
        bundle: The bundle.
        runtime: `auto` is the reference runtime, and ExecuTorch where that cannot look inside.
        execution: Numerics, device and memory of the reference runtime.

    Raises:
        ArtifactError: the program is damaged, or contradicts the manifest.
        ConfigError: runtime, backend and execution contradict each other.
        SystemUnfitError: the runtime is not on this system.
    """
    description = bundle.manifest.description
    if runtime == EXECUTORCH:
        return _executorch(bundle.program, description, execution, apart=not bundle.own)
    if runtime == REFERENCE and BACKENDS[description.backend].runtime != "reference":
        raise ConfigError(
            f"'{bundle.folder}' is lowered for {description.backend}, into which the reference "
            "runtime cannot look; leave --runtime out, or export with --backend coreml."
        )
    return open_runner(bundle, execution)


def program_runner_of(path: Path, runtime: str, execution: Execution) -> Runner:
    """Return what runs a `.pte` without a bundle, whose method `forward` is one Core ML program.

    For arguments and errors see `bundle_runner`.
    """
    if runtime == EAGER:
        raise ConfigError(
            "--runtime eager runs a model in PyTorch, and nothing tells which one a .pte was made "
            "from; give the bundle, or evaluate the model itself."
        )
    runner = ReferenceRunner(path, execution)
    if runtime == EXECUTORCH:
        return _executorch(path, runner.description, execution, apart=True)
    return runner


def _executorch(
    path: Path, description: Description, execution: Execution, *, apart: bool
) -> Runner:
    if execution != DECLARED:
        raise ConfigError(
            "ExecuTorch's runtime has no choice of mode or device; leave both out, or use "
            "--runtime reference."
        )
    if BACKENDS[description.backend].runtime != "reference":
        return ExecutorchRunner(path, description, apart=apart)
    if platform.system() != "Darwin":
        raise SystemUnfitError(
            f"--runtime executorch runs '{path}' on Core ML, which macOS alone has; use "
            "--runtime reference here, or export with --backend xnnpack."
        )
    return ExecutorchRunner(path, description, apart=apart, label=_CORE_ML)
