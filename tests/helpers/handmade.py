"""Small Core ML programs, written with coremltools operation by operation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import coremltools as ct
from coremltools.converters.mil.mil import Builder as mb
from coremltools.converters.mil.mil import Function, Program, types

from llm_coreml.reference import CoreMLProgram, Execution, load

HALF, SINGLE, INT = types.fp16, types.fp32, types.int32


def tensor(*shape: int, dtype: Any = SINGLE) -> Any:
    """Return an input of a function."""
    return mb.placeholder(shape=shape, dtype=dtype)


def package(path: Path, inputs: dict[str, Any], body: Callable[..., Any]) -> Path:
    """Write a `.mlpackage` whose function returns what `body(**inputs)` does, untouched.

    The results are named by the operations that make them.
    """
    program = Program()
    with Function(inputs=inputs, opset_version=ct.target.iOS18) as function:
        results = body(**function.inputs)
        function.set_outputs(list(results) if isinstance(results, tuple) else [results])
    program.add_function("main", function)
    model = ct.convert(
        program,
        convert_to="mlprogram",
        minimum_deployment_target=ct.target.iOS18,
        compute_precision=ct.precision.FLOAT32,
        pass_pipeline=ct.PassPipeline.EMPTY,
        skip_model_load=True,
    )
    model.save(str(path))
    return path


def program(
    folder: Path, inputs: dict[str, Any], body: Callable[..., Any], mode: str = "declared"
) -> CoreMLProgram:
    """Return the program, loaded."""
    path = folder / f"{len(list(folder.iterdir()))}.mlpackage"
    return load(package(path, inputs, body), execution=Execution(mode=mode))
