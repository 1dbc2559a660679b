"""Lower a torch program to an ExecuTorch program whose body is one Core ML program.

lower_coreml(lambda: trace(decoder, 1), job, constants, Path("model.pte"))
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import coremltools as ct
from executorch.backends.apple.coreml.compiler import CoreMLBackend
from executorch.exir import (
    EdgeCompileConfig,
    EdgeProgramManager,
    ExecutorchBackendConfig,
    ExecutorchProgramManager,
    to_edge_transform_and_lower,
)
from executorch.exir._serialize._cord import FileBackedData
from executorch.exir._serialize._serialize import serialize_for_executorch
from executorch.exir.backend.compile_spec_schema import CompileSpec
from executorch.exir.lowered_backend_module import LoweredBackendModule
from torch.export import ExportedProgram

from llm_coreml.artifact.description import TOKENS
from llm_coreml.artifact.method_plan import Constant
from llm_coreml.config import Job
from llm_coreml.lower.backend import CoreMLFileBackend
from llm_coreml.lower.mil_passes import pass_names
from llm_coreml.lower.partition import AskTheCast, WholeMethodPartitioner

# Shares of a lowering's time, as measured on models of 4 and 16 layers.
_TRACED, _PARTITIONED = 0.2, 0.5
_PRECISIONS = {"fp16": ct.precision.FLOAT16, "fp32": ct.precision.FLOAT32}


def lower_coreml(
    trace: Callable[[], ExportedProgram],
    job: Job,
    constants: Mapping[str, Constant],
    path: Path,
    on_progress: Callable[[float], None] = lambda _: None,
    enumerated: Sequence[int] = (),
) -> None:
    """Write the program; identical inputs give identical bytes.

    Python collects no garbage in this process until it is done.

    Args:
        trace: Gives the torch program of the quantized decoder.
        job: Target, OS and precision.
        constants: Constant methods, see `traced.constant_methods`.
        path: Where to write the `.pte`.
        on_progress: Called with the share of the usual time that is over, 0 to 1.
        enumerated: The lengths that Core ML is told of, if the program has a symbolic one.
    """
    with _uncollected():
        edge = _lowered(trace, job, constants, on_progress, enumerated)
        _write(edge.to_executorch(), path)


def _lowered(
    trace: Callable[[], ExportedProgram],
    job: Job,
    constants: Mapping[str, Constant],
    on_progress: Callable[[float], None],
    enumerated: Sequence[int],
) -> EdgeProgramManager:
    exported = trace()
    on_progress(_TRACED)
    specs = _compile_specs(exported, job, enumerated)
    partitioner = WholeMethodPartitioner(
        CoreMLFileBackend.__name__, specs, lambda: on_progress(_PARTITIONED)
    )
    edge = to_edge_transform_and_lower(
        exported,
        transform_passes=[AskTheCast()],
        partitioner=[partitioner],
        compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True),
        constant_methods=dict(constants),
    )
    _name_backend(edge)
    return edge


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Collect no garbage but when asked: graphs live long, and going through them takes time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _compile_specs(
    exported: ExportedProgram, job: Job, enumerated: Sequence[int]
) -> list[CompileSpec]:
    specs: list[CompileSpec] = CoreMLBackend.generate_compile_specs(
        compute_unit=ct.ComputeUnit[job.target.compute_unit],
        minimum_deployment_target=getattr(ct.target, job.opset),
        compute_precision=_PRECISIONS[job.precision.name],
        pass_names=pass_names(),
    )
    if enumerated:
        shapes = {TOKENS: [[1, length] for length in enumerated]}
        specs.append(CoreMLBackend.generate_enumerated_shapes_compile_spec(exported, shapes))
    return specs


def _name_backend(edge: EdgeProgramManager) -> None:
    """Give the delegate to the backend that devices have."""
    module: Any = edge.exported_program().graph_module
    for child in module.children():
        if isinstance(child, LoweredBackendModule):
            child._backend_id = CoreMLBackend.__name__


def _write(program: ExecutorchProgramManager, path: Path) -> None:
    """Write the `.pte`, with the blob that lies in a file in the place of its path."""
    (delegate,) = program.executorch_program.backend_delegate_data
    blob = Path(delegate.data.decode())
    delegate.data = FileBackedData(str(blob))
    content, _ = serialize_for_executorch(
        program._emitter_output, ExecutorchBackendConfig(), program._data_serializer
    )
    with path.open("wb") as file:
        content.write_to_file(file)
    blob.unlink()
