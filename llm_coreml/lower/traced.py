"""The torch programs of an artifact and what every backend's runner needs to know of them.

program = trace_program(decoder, lengths=(1, 8, 64))
method = trace_method(Padded(...), longest=64)
methods = constant_methods(spec, shapes, bos_id=1, eos_ids=(2,))
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.export import Dim, ExportedProgram

from llm_coreml.artifact.description import REWINDS
from llm_coreml.artifact.method_plan import Constant
from llm_coreml.config import Shapes
from llm_coreml.decoder import Decoder, DecoderSpec
from llm_coreml.lower.padded import Method, Padded


def trace_program(decoder: Decoder, lengths: Sequence[int]) -> ExportedProgram:
    """Export `forward(tokens int32 [1, P], start_pos int32 [1], last_pos int32 [1])`.

    torch never lets a symbol be 1 here, so its range begins at 2; nothing in the graph depends on
    it.

    Args:
        decoder: What to export.
        lengths: What P may be, ascending: 1 alone, then without `last_pos`, or else any up to the
            context.
    """
    longest = lengths[-1]
    tokens = torch.zeros(1, max(2, longest // 2) if longest > 1 else 1, dtype=torch.int32)
    symbols = {1: Dim.AUTO(min=1, max=decoder.context)} if longest > 1 else None
    positions = [torch.zeros(1, dtype=torch.int32) for _ in range(2 if longest > 1 else 1)]
    return _export(decoder, (tokens, *positions), symbols)


def trace_method(method: Method, longest: int) -> ExportedProgram:
    """Export `forward(tokens int64 [1, S], start_pos int64 [1])` for S from 1 to `longest`."""
    tokens = torch.zeros(1, longest, dtype=torch.int64)
    symbols = {1: Dim("S", min=1, max=longest)} if longest > 1 else None
    if isinstance(method, Padded) and method.lengths is None:
        # What is inside is traced with it, see `trace_program`.
        symbols = {1: Dim.AUTO(min=1, max=longest)}
    return _export(method, (tokens, torch.zeros(1, dtype=torch.int64)), symbols)


def _export(
    module: nn.Module, inputs: tuple[torch.Tensor, ...], symbols: dict[int, Any] | None
) -> ExportedProgram:
    dynamic = (symbols, *[None] * (len(inputs) - 1))
    with torch.no_grad():
        return torch.export.export(module.eval(), inputs, dynamic_shapes=dynamic, strict=False)


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
    rewinds = spec.rewinds(shapes.extent)
    if rewinds is not None:
        methods[REWINDS] = rewinds
    if bos_id is not None:
        methods["get_bos_id"] = bos_id
    if eos_ids:
        methods["get_eos_ids"] = list(eos_ids)
    return methods
