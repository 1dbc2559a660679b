"""Lower a decoder to an ExecuTorch program whose body is one Core ML program.

lower_coreml(decoder, job, shapes, methods, Path("model.pte"))
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
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

from llm_coreml.config import Job, Shapes
from llm_coreml.decoder import Decoder
from llm_coreml.lower.backend import CoreMLFileBackend
from llm_coreml.lower.mil_passes import pass_names
from llm_coreml.lower.partition import AskTheCast, WholeMethodPartitioner
from llm_coreml.lower.program import TOKENS, trace

# Shares of a lowering's time, as measured on models of 4 and 16 layers.
_TRACED, _PARTITIONED = 0.2, 0.5
_PRECISIONS = {"fp16": ct.precision.FLOAT16, "fp32": ct.precision.FLOAT32}


def lower_coreml(
    decoder: Decoder,
    job: Job,
    shapes: Shapes,
    methods: dict[str, int | bool | list[int]],
    path: Path,
    on_progress: Callable[[float], None] = lambda _: None,
) -> None:
    """Write the program; identical inputs give identical bytes.

    Python collects no garbage in this process until it is done.

    Args:
        decoder: Quantized decoder.
        job: Target, OS and precision.
        shapes: Context and enumerated lengths.
        methods: Constant methods, see `program.constant_methods`.
        path: Where to write the `.pte`.
        on_progress: Called with the share of the usual time that is over, 0 to 1.
    """
    with _uncollected():
        edge = _lowered(decoder, job, shapes, methods, on_progress)
        _write(edge.to_executorch(), path)


def _lowered(
    decoder: Decoder,
    job: Job,
    shapes: Shapes,
    methods: dict[str, int | bool | list[int]],
    on_progress: Callable[[float], None],
) -> EdgeProgramManager:
    exported = trace(decoder, shapes)
    on_progress(_TRACED)
    specs = _compile_specs(exported, job, shapes)
    partitioner = WholeMethodPartitioner(
        CoreMLFileBackend.__name__, specs, lambda: on_progress(_PARTITIONED)
    )
    edge = to_edge_transform_and_lower(
        exported,
        transform_passes=[AskTheCast()],
        partitioner=[partitioner],
        compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True),
        constant_methods=dict(methods),
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


def _compile_specs(exported: ExportedProgram, job: Job, shapes: Shapes) -> list[CompileSpec]:
    specs: list[CompileSpec] = CoreMLBackend.generate_compile_specs(
        compute_unit=ct.ComputeUnit[job.target.compute_unit],
        minimum_deployment_target=getattr(ct.target, job.opset),
        compute_precision=_PRECISIONS[job.precision.name],
        pass_names=pass_names(),
    )
    if len(shapes.seq_lengths) > 1:
        specs.append(_enumerated_shapes(exported, shapes))
    return specs


def _enumerated_shapes(exported: ExportedProgram, shapes: Shapes) -> CompileSpec:
    lengths = [[1, length] for length in shapes.seq_lengths]
    return CoreMLBackend.generate_enumerated_shapes_compile_spec(exported, {TOKENS: lengths})


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
