"""The torch program of an artifact and what every backend's runner needs to know of it.

exported = trace(decoder, shapes)
methods = constant_methods(spec, shapes, bos_id=1, eos_ids=(2,))
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.export import Dim, ExportedProgram

from llm_coreml.config import Shapes
from llm_coreml.decoder import Decoder, DecoderSpec

TOKENS = "tokens"
START_POS = "start_pos"


def trace(decoder: Decoder, shapes: Shapes) -> ExportedProgram:
    """Export `forward(tokens int64 [1, S], start_pos int64 [1])`.

    S is symbolic when several lengths are accepted. torch never lets a symbol be 1, so the
    range begins at 2; nothing in the graph depends on it, and 1 is enumerated for Core ML.
    """
    lengths = shapes.seq_lengths
    dynamic = len(lengths) > 1
    example = max(2, lengths[-1] // 2) if dynamic else lengths[0]
    tokens = torch.zeros(1, example, dtype=torch.int64)
    start_pos = torch.zeros(1, dtype=torch.int64)
    length = Dim.AUTO(min=1, max=shapes.context)
    with torch.no_grad():
        return torch.export.export(
            decoder.eval(),
            (tokens, start_pos),
            dynamic_shapes=({1: length} if dynamic else None, None),
            strict=False,
        )


def constant_methods(
    spec: DecoderSpec, shapes: Shapes, bos_id: int | None, eos_ids: Sequence[int]
) -> dict[str, int | bool | list[int]]:
    """Return the constant methods that ExecuTorch's LLM runners read from a program."""
    methods: dict[str, int | bool | list[int]] = {
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
