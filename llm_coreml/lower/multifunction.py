"""Lower a decoder to methods that share the weights: one Core ML model with a function for each.

    lower_functions(decoder, job, description, Path("model.pte"))

Core ML's weights lie once in the file, as ExecuTorch's strategy "positional" has them, and each
method's delegate refers to them and says which function it runs.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

from llm_coreml.artifact.description import Description
from llm_coreml.artifact.packages import REFERENCE_MARK
from llm_coreml.config import Job
from llm_coreml.decoder import Decoder
from llm_coreml.lower.coreml import calling, signature_of
from llm_coreml.lower.method import CoreMLCall, edge_methods, write_methods
from llm_coreml.lower.padded import method_around
from llm_coreml.lower.program import compile_specs, save_package, write_functions
from llm_coreml.lower.signature import empty
from llm_coreml.lower.traced import trace_method, trace_program
from llm_coreml.machine import uncollected


def lower_functions(
    decoder: Decoder,
    job: Job,
    description: Description,
    path: Path,
    on_progress: Callable[[float], None] = lambda _: None,
) -> None:
    """Write the program, see `coreml.lower_coreml`; each method has one length."""
    caches = empty(description.caches)
    with uncollected(), tempfile.TemporaryDirectory(prefix="llm-coreml-") as folder:
        packages, methods, specs = {}, {}, {}
        for name, form in description.methods.items():
            exported = trace_program(decoder, form.seq_lengths, caches=caches)
            exported = exported.run_decompositions({})
            specs[name] = compile_specs(exported, job, form.seq_lengths)
            packages[name] = Path(folder, f"{name}.mlpackage")
            save_package(exported, specs[name], packages[name])
            call = CoreMLCall(name, signature_of(description, name))
            around = method_around(
                calling(call), description.context, form.seq_lengths, description.outputs_by_row
            )
            methods[name] = trace_method(around, form.seq_lengths[-1], list(caches.values()))
            on_progress(len(methods) / (1 + len(description.methods)))
        blob = Path(folder, "blob")
        key = write_functions(packages, blob)
        edge = edge_methods(methods, specs, description.constant_methods)
        references: dict[str, Path | bytes] = {name: reference(key, name) for name in methods}
        write_methods(edge.to_executorch(), references, path, {key: blob})


def reference(key: str, function: str) -> bytes:
    """Return what a delegate holds whose model lies in the file under a name of its own."""
    told = {"version": 1, "key": key, "functionName": function}
    return REFERENCE_MARK + json.dumps(told).encode()
