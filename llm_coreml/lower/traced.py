"""The torch program of an artifact and what every backend's runner needs to know of it.

exported = trace(decoder, lengths=(1, 8, 64), context=512)
methods = constant_methods(spec, shapes, bos_id=1, eos_ids=(2,))
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.export import Dim, ExportedProgram

from llm_coreml.artifact.method_plan import Constant
from llm_coreml.config import Shapes
from llm_coreml.decoder import DecoderSpec


def trace(
    module: nn.Module, lengths: Sequence[int], context: int, dtype: torch.dtype = torch.int64
) -> ExportedProgram:
    """Export `forward(tokens [1, S], start_pos [1])`.

    torch never lets a symbol be 1, so its range begins at 2; nothing in the graph depends on it.

    Args:
        module: What to export.
        lengths: What S may be, ascending: one number, or else any up to the context.
        context: Positions of the states.
        dtype: Type of both inputs.
    """
    several, longest = len(lengths) > 1, lengths[-1]
    tokens = torch.zeros(1, max(2, longest // 2) if several else longest, dtype=dtype)
    symbols = {1: Dim.AUTO(min=1, max=context)} if several else None
    with torch.no_grad():
        return torch.export.export(
            module.eval(),
            (tokens, torch.zeros(1, dtype=dtype)),
            dynamic_shapes=(symbols, None),
            strict=False,
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
