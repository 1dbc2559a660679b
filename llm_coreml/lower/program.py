"""Convert a traced decoder to a Core ML program, and write the delegate's blob that holds it.

No weight is copied, and the result is a file: ExecuTorch's backend copies the program with its
weights, and hands on the Core ML package as bytes, of which several copies exist until the `.pte`
is written.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any

import coremltools as ct
import numpy
from executorch.backends.apple.coreml.compiler import CoreMLBackend
from executorch.exir.backend.compile_spec_schema import CompileSpec
from torch.export import ExportedProgram

import llm_coreml.lower.coreml_ops
import llm_coreml.lower.weight_ops  # noqa: F401 - both register with coremltools
from llm_coreml.artifact.description import MAIN_FUNCTION, TOKENS
from llm_coreml.artifact.mapped import map_folder
from llm_coreml.artifact.milproto import parse
from llm_coreml.config import Job
from llm_coreml.lower.advice import advised, check_systems
from llm_coreml.lower.mil_passes import pass_names
from llm_coreml.lower.package import write_blob
from llm_coreml.quiet import no_bars

_PRECISIONS = {"fp16": ct.precision.FLOAT16, "fp32": ct.precision.FLOAT32}


def compile_specs(
    exported: ExportedProgram,
    job: Job,
    lengths: Sequence[int],
    paired: Mapping[str, Sequence[Sequence[int]]] = MappingProxyType({}),
) -> list[CompileSpec]:
    """Return how Core ML is to compile and load a program.

    Args:
        exported: The traced decoder.
        job: Target, OS and precision.
        lengths: What a call may have.
        paired: Of further inputs, by name, the shape that goes with each of the lengths.
    """
    specs: list[CompileSpec] = CoreMLBackend.generate_compile_specs(
        compute_unit=ct.ComputeUnit[job.target.compute_unit],
        minimum_deployment_target=getattr(ct.target, job.opset),
        compute_precision=_PRECISIONS[job.precision.name],
        pass_names=pass_names(job.passes, job.cuts, job.layout, job.operations),
    )
    further = (spec.partition("=") for spec in job.compile_specs)
    specs += [CompileSpec(key, value.encode()) for key, _, value in further]
    if len(lengths) > 1:
        shapes = {TOKENS: [[1, length] for length in lengths]}
        shapes |= {name: [list(shape) for shape in own] for name, own in paired.items()}
        specs.append(enumerated(exported, shapes))
    return specs


def enumerated(
    exported: ExportedProgram, shapes: Mapping[str, Sequence[Sequence[int]]]
) -> CompileSpec:
    """Return what tells Core ML of all shapes that inputs may have, by name and paired."""
    told = {name: [list(shape) for shape in own] for name, own in shapes.items()}
    return CoreMLBackend.generate_enumerated_shapes_compile_spec(exported, told)


def write_program(exported: ExportedProgram, specs: list[CompileSpec], blob: Path) -> None:
    """Convert, and write the delegate's blob.

    Args:
        exported: The traced decoder, without the mutations that torch leaves in a graph.
        specs: See `compile_specs`.
        blob: Where to write.

    Raises:
        UnsupportedError: the system that the program is for cannot have it.
    """
    model = _converted(exported, specs)
    spec = model.get_spec()
    names = asdict(CoreMLBackend.model_metadata_from_spec(spec, identifier=""))
    with blob.open("wb") as file:
        write_blob(Path(model.package_path), spec, names, file)


def save_package(exported: ExportedProgram, specs: list[CompileSpec], package: Path) -> None:
    """Convert, and write the `.mlpackage`, to be a function of a model; see `write_program`."""
    _converted(exported, specs).save(str(package))


def write_functions(packages: Mapping[str, Path], blob: Path) -> str:
    """Write the blob of one model with a function for each package; equal weights exist once.

    Args:
        packages: Of one function each, by the name that it is to have.
        blob: Where to write.

    Returns:
        Under which name the methods refer to it.
    """
    functions = ct.utils.MultiFunctionDescriptor()
    for name, package in packages.items():
        functions.add_function(str(package), MAIN_FUNCTION, name)
    functions.default_function_name = next(iter(packages))
    joined = blob.with_name("joined functions.mlpackage")  # which is no function's name
    with no_bars():
        ct.utils.save_multifunction(functions, str(joined))
    spec = ct.models.MLModel(str(joined), skip_model_load=True).get_spec()
    methods = {
        function.name: {
            "inputNames": [port.name for port in function.input],
            "outputNames": [port.name for port in function.output],
        }
        for function in spec.description.functions
    }
    with blob.open("wb") as file:
        return f"coreml_{write_blob(joined, spec, {'methods': methods}, file)}"


def _converted(exported: ExportedProgram, specs: list[CompileSpec]) -> Any:
    """Return the model, whose package lies in a folder of its own as long as it lives.

    Raises:
        UnsupportedError: the system that the program is for cannot have it.
    """
    target = CoreMLBackend.min_deployment_target_from_compile_specs(specs)
    with no_bars(), _numbers_undrawn(), advised(exported, target.name):
        model = CoreMLBackend._convert_to_mlmodel(exported, specs)
    check_systems(parse(map_folder(Path(model.package_path)), ""), exported, target.name)
    # The MIL program, whose operations refer to each other, holds all weights.
    model._mil_program = None
    gc.collect()
    return model


@contextlib.contextmanager
def _numbers_undrawn() -> Iterator[None]:
    """Leave the caller's sequence of random numbers: coremltools' pass `fuse_prelu` draws some."""
    state = numpy.random.get_state()
    try:
        yield
    finally:
        numpy.random.set_state(state)
