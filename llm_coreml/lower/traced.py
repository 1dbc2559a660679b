"""The torch program of an artifact and what every backend's runner needs to know of it.

exported = trace_symbolic(decoder, longest=64)
methods = constant_methods(spec, shapes, bos_id=1, eos_ids=(2,))
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.export import Dim, ExportedProgram

from llm_coreml.artifact.method_plan import Constant
from llm_coreml.config import Shapes
from llm_coreml.decoder import Decoder, DecoderSpec


def trace(decoder: Decoder, length: int) -> ExportedProgram:
    """Export `forward(tokens int64 [1, length], start_pos int64 [1])`."""
    return _export(decoder, length, None)


def trace_symbolic(decoder: Decoder, longest: int) -> ExportedProgram:
    """Export `forward(tokens int64 [1, S], start_pos int64 [1])` for any S up to the context.

    torch never lets a symbol be 1, so the range begins at 2; nothing in the graph depends on it,
    and 1 is enumerated for Core ML.

    Args:
        decoder: What to export.
        longest: The largest S that will be asked for, of which the example is half.
    """
    symbol = Dim.AUTO(min=1, max=decoder.context)
    return _export(decoder, max(2, longest // 2), {1: symbol})


def _export(decoder: Decoder, length: int, dynamic: dict[int, Any] | None) -> ExportedProgram:
    tokens = torch.zeros(1, length, dtype=torch.int64)
    start_pos = torch.zeros(1, dtype=torch.int64)
    with torch.no_grad():
        return torch.export.export(
            decoder.eval(), (tokens, start_pos), dynamic_shapes=(dynamic, None), strict=False
        )


def constant_methods(
    spec: DecoderSpec, shapes: Shapes, bos_id: int | None, eos_ids: Sequence[int]
) -> dict[str, Constant]:
    """Return the constant methods that ExecuTorch's LLM runners read from a program."""
    methods: dict[str, Constant] = {
        "get_max_seq_len": shapes.seq_lengths[-1],
        "get_max_context_len": shapes.context,
        "get_vocab_size": spec.vocab_size,
        "get_n_layers": len(spec.layers),
        "use_kv_cache": True,
        "use_sdpa_with_kv_cache": False,
        "enable_dynamic_shape": len(shapes.seq_lengths) > 1,
    }
    if bos_id is not None:
        methods["get_bos_id"] = bos_id
    if eos_ids:
        methods["get_eos_ids"] = list(eos_ids)
    return methods
