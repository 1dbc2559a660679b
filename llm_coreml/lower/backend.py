"""ExecuTorch's Core ML backend, but for the memory: no weight is copied, and the result is a file.

The backend of ExecuTorch copies the program with its weights, and hands on the Core ML package as
bytes, of which several copies exist until the `.pte` is written.
"""

from __future__ import annotations

import copy
import gc
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any, final

from executorch.backends.apple.coreml.compiler import CoreMLBackend
from executorch.exir.backend.backend_details import BackendDetails, PreprocessResult
from executorch.exir.backend.compile_spec_schema import CompileSpec
from torch.export import ExportedProgram

import llm_coreml.lower.coreml_ops
import llm_coreml.lower.weight_ops  # noqa: F401 - both register with coremltools
from llm_coreml.lower.package import write_blob


@final
class CoreMLFileBackend(BackendDetails):  # type: ignore[misc]
    """Converts a program and leaves the delegate's blob in a temporary file.

    ExecuTorch finds a backend by the name of its class.
    """

    @classmethod
    def copy_exported_program_for_preprocess(
        cls, edge_program: ExportedProgram, compile_specs: list[CompileSpec]
    ) -> ExportedProgram:
        """Copy the graph, but share the weights."""
        shared: dict[int, Any] = {id(value): value for value in edge_program.state_dict.values()}
        return copy.deepcopy(edge_program, shared)

    @staticmethod
    def preprocess(
        edge_program: ExportedProgram, compile_specs: list[CompileSpec]
    ) -> PreprocessResult:
        """Return the path of the blob as the result's bytes."""
        model = CoreMLBackend._convert_to_mlmodel(edge_program, compile_specs)
        package = Path(model.package_path)
        spec = model.get_spec()
        names = asdict(CoreMLBackend.model_metadata_from_spec(spec, identifier=""))
        # The MIL program, whose operations refer to each other, holds all weights.
        model._mil_program = None
        gc.collect()
        handle, path = tempfile.mkstemp(suffix=".blob")
        with open(handle, "wb") as file:
            write_blob(package, spec, names, file)
        return PreprocessResult(processed_bytes=path.encode())
