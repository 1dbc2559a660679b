"""The runner that fits a bundle's program on this machine.

runner = open_runner(open_bundle(Path("out")))
"""

from __future__ import annotations

from llm_coreml.bundle.folder import Bundle
from llm_coreml.errors import ConfigError
from llm_coreml.reference.program.execution import Execution
from llm_coreml.runtime.executorch import ExecutorchRunner
from llm_coreml.runtime.reference import DECLARED, ReferenceRunner
from llm_coreml.runtime.runner import Runner
from llm_coreml.targets import BACKENDS


def open_runner(bundle: Bundle, execution: Execution = DECLARED) -> Runner:
    """Return the runner for a bundle's program on this machine.

    Raises:
        ArtifactError: the program is damaged, or contradicts the manifest.
        ConfigError: the execution asks for what is not there.
    """
    description = bundle.manifest.description
    if BACKENDS[description.backend].runtime != "reference":
        if execution != DECLARED:
            raise ConfigError(
                f"'{bundle.folder}' is lowered for {description.backend}, whose runtime has no "
                "choice of mode or device; leave both out, or export with --backend coreml."
            )
        # The runtime trusts what it reads, and a checksum anybody can count.
        return ExecutorchRunner(bundle.program, description, apart=not bundle.own)
    # A manifest that may be another's does not say what the program is like.
    return ReferenceRunner(bundle.program, execution, description if bundle.checked else None)
