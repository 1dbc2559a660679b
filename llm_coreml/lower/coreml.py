"""Lower a decoder to an ExecuTorch program whose body is one Core ML program.

lower_coreml(decoder, job, description, Path("model.pte"))
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from llm_coreml.artifact.description import (
    MAIN_FUNCTION,
    MAIN_METHOD,
    START_POS,
    TOKENS,
    Description,
)
from llm_coreml.config import Job
from llm_coreml.decoder import Decoder
from llm_coreml.lower.method import CoreMLCall, edge_methods, write_methods
from llm_coreml.lower.padded import Program, method_around
from llm_coreml.lower.program import compile_specs, write_program
from llm_coreml.lower.signature import Signature, empty
from llm_coreml.lower.traced import trace_method, trace_program
from llm_coreml.machine import uncollected

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
    with uncollected(), tempfile.TemporaryDirectory(prefix="llm-coreml-") as folder:
        # coremltools wants the writes of the states among the results.
        caches = empty(description.caches)
        exported = trace_program(decoder, lengths, description.ranged, caches)
        exported = exported.run_decompositions({})
        on_progress(_TRACED)
        specs = compile_specs(exported, job, () if description.ranged else lengths)
        blob = Path(folder, "blob")
        write_program(exported, specs, blob)
        del exported
        call = CoreMLCall(MAIN_FUNCTION, signature_of(description, MAIN_METHOD))
        padding = None if description.ranged else lengths
        method = method_around(
            calling(call), description.context, padding, description.outputs_by_row
        )
        traced = {MAIN_METHOD: trace_method(method, lengths[-1], list(caches.values()))}
        edge = edge_methods(traced, {call.name: specs}, description.constant_methods)
        write_methods(edge.to_executorch(), {call.name: blob}, path)


def signature_of(description: Description, method: str) -> Signature:
    """Return what the program in a method takes and gives, as `Decoder.forward` does."""
    longest = description.methods[method].seq_lengths[-1]
    size = "P" if longest > 1 else 1
    caches = tuple(f"{name} {text}" for name, text in description.caches.items())
    last = ("last_pos int32 [1]",) if longest > 1 else ()
    takes = (f"{TOKENS} int32 [1, {size}]", *caches, f"{START_POS} int32 [1]", *last)
    rows = size if description.every_row else 1
    return Signature(takes, (*head_outputs(description, rows), *caches))


def head_outputs(description: Description, rows: int | str) -> tuple[str, ...]:
    """Return what a program with the head gives of so many rows, each as `Port.of` reads it."""
    width = description.head.count or description.constant_methods["get_vocab_size"]
    dtypes = ("float32", "int32")
    return tuple(
        f"{name} {dtype} [1, {rows}, {width}]"
        for name, dtype in zip(description.head.gives, dtypes, strict=False)
    )


def calling(call: CoreMLCall) -> Program:
    """Return a call with positions that may be absent; see `padded.Program`."""

    def program(
        tokens: torch.Tensor,
        start_pos: torch.Tensor,
        last_pos: torch.Tensor | None,
        *caches: torch.Tensor,
    ) -> torch.Tensor | tuple[torch.Tensor, ...]:
        last = () if last_pos is None else (last_pos,)
        given = call(tokens, *caches, start_pos, *last)
        return given if len(given) > 1 else given[0]

    return program
