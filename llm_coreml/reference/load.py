"""From a path to what runs: the Core ML program alone, or a whole method as a runner calls it.

    program = load("model.pte")
    logits = load_method("model.pte")(tokens, start_pos)

A `.pte` may hold one Core ML delegate or several; a method runs several together.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llm_coreml.artifact import pte
from llm_coreml.artifact.description import MAIN_METHOD
from llm_coreml.artifact.packages import BACKEND, Packages, model_of_folder
from llm_coreml.errors import ArtifactError, nearest
from llm_coreml.reference.method.method import LoadedMethod
from llm_coreml.reference.program.coreml_program import CoreMLProgram
from llm_coreml.reference.program.execution import Execution

_DEFAULT = Execution()


def load(
    path: str | Path, function: str | None = None, execution: Execution = _DEFAULT
) -> CoreMLProgram:
    """Load the Core ML program in a `.pte`, or in a `.mlpackage` folder.

    Args:
        path: the file or folder.
        function: which function of a multifunction model; its default one if None.
        execution: numerics, device and memory.

    Raises:
        ConfigError: `execution` asks for what is not there.
        ArtifactError: the file is damaged, hostile, or holds what the reference cannot run.
    """
    path = Path(path)
    if path.is_dir():
        return CoreMLProgram(
            model_of_folder(path), function, execution.pool(), compiled=execution.compiled
        )
    container = pte.read(path)
    delegates = [delegate for method in container.methods.values() for delegate in method.delegates]
    if not delegates:
        raise ArtifactError(f"'{path}' has no delegate: nothing in it runs on Core ML.")
    chosen = [delegate for delegate in delegates if delegate.backend == BACKEND]
    if not chosen:
        others = ", ".join(sorted({delegate.backend for delegate in delegates}))
        raise ArtifactError(f"'{path}' is lowered for {others}, not for Core ML.")
    packages = Packages(container)
    lowered = [packages.open(delegate) for delegate in chosen]
    if len({id(item.package) for item in lowered}) > 1:
        raise ArtifactError(
            f"'{path}' has {len(chosen)} Core ML delegates; a single program was asked for. "
            "Load the method instead."
        )
    package = lowered[0].package
    return CoreMLProgram(package.model, function, execution.pool(), compiled=execution.compiled)


def load_method(
    path: str | Path, name: str = MAIN_METHOD, execution: Execution = _DEFAULT
) -> LoadedMethod:
    """Load the method `name` of the `.pte` at `path`.

    Args:
        path: the file.
        name: the method.
        execution: numerics, device and memory.

    Raises:
        ConfigError: `execution` asks for what is not there.
        ArtifactError: the file is damaged, has no such method, or the method does what the
            reference cannot run.
    """
    return load_methods(path, execution, (name,))[name]


def load_methods(
    path: str | Path, execution: Execution = _DEFAULT, names: Sequence[str] | None = None
) -> dict[str, LoadedMethod]:
    """Load methods of the `.pte` at `path`; shared weights exist once.

    States are each method's own, as on a device.

    Args:
        path: the file.
        execution: numerics, device and memory.
        names: the methods; None takes all that have delegates.

    Raises:
        ConfigError: `execution` asks for what is not there.
        ArtifactError: the file is damaged, has no such method, or does what the reference cannot
            run.
    """
    container = pte.read(path)
    if names is None:
        names = [name for name, method in container.methods.items() if method.delegates]
    for name in names:
        if name not in container.methods:
            raise ArtifactError(
                f"'{path}' has no method '{name}', only {', '.join(sorted(container.methods))}."
                f"{nearest(name, container.methods)}"
            )
        if not container.methods[name].delegates:
            raise ArtifactError(f"Method '{name}' of '{path}' has no delegate.")
    return _load(container, names, execution)


def _load(
    container: pte.Container, names: Sequence[str], execution: Execution
) -> dict[str, LoadedMethod]:
    packages, constants = Packages(container), pte.constants_of(container)
    pool = execution.pool()
    return {
        name: LoadedMethod(
            container.methods[name], packages, pool, constants, compiled=execution.compiled
        )
        for name in names
    }
