"""Lower a decoder to an ExecuTorch program whose body is one Core ML program.

lower_coreml(decoder, job, description, Path("model.pte"))
"""

from __future__ import annotations

import contextlib
import gc
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from executorch.exir import ExecutorchBackendConfig, ExecutorchProgramManager
from executorch.exir._serialize._cord import FileBackedData
from executorch.exir._serialize._serialize import serialize_for_executorch

from llm_coreml.artifact.description import Description
from llm_coreml.config import Job
from llm_coreml.decoder import Decoder
from llm_coreml.lower.method import edge_method, program_of
from llm_coreml.lower.padded import method_around
from llm_coreml.lower.program import compile_specs, write_program
from llm_coreml.lower.traced import trace_program

# Share of a lowering's time, as measured on models of 4 and 16 layers.
_TRACED = 0.4


def lower_coreml(
    decoder: Decoder,
    job: Job,
    description: Description,
    path: Path,
    on_progress: Callable[[float], None] = lambda _: None,
) -> None:
    """Write the program; identical inputs give identical bytes.

    Python collects no garbage in this process until it is done.

    Args:
        decoder: Quantized decoder.
        job: Target, OS and precision.
        description: What the file is to offer.
        path: Where to write the `.pte`.
        on_progress: Called with the share of the usual time that is over, 0 to 1.
    """
    lengths = description.seq_lengths
    with _uncollected(), tempfile.TemporaryDirectory(prefix="llm-coreml-") as folder:
        # coremltools wants the writes of the states among the results.
        exported = trace_program(decoder, lengths).run_decompositions({})
        on_progress(_TRACED)
        specs = compile_specs(exported, job, lengths)
        blob = Path(folder, "blob")
        write_program(exported, specs, blob)
        del exported
        program = program_of(description, decoder.spec.vocab_size)
        method = method_around(program, description.context, lengths, description.every_row)
        edge = edge_method(method, lengths[-1], description.constant_methods, specs)
        _write(edge.to_executorch(), blob, path)


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


def _write(program: ExecutorchProgramManager, blob: Path, path: Path) -> None:
    """Write the `.pte`, with the blob that lies in a file as its delegate."""
    (delegate,) = program.executorch_program.backend_delegate_data
    delegate.data = FileBackedData(str(blob))
    content, _ = serialize_for_executorch(
        program._emitter_output, ExecutorchBackendConfig(), program._data_serializer
    )
    with path.open("wb") as file:
        content.write_to_file(file)
