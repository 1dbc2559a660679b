"""The torch programs of an artifact and what every backend's runner needs to know of them.

program = trace_program(decoder, lengths=(1, 8, 64))
method = trace_method(Padded(...), longest=64)
methods = constant_methods(spec, shapes, bos_id=1, eos_ids=(2,))
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import OutputKind
from torch.utils._pytree import tree_map
from torch.utils._sympy.value_ranges import ValueRanges

from llm_coreml.artifact.description import HIDDEN, LAST_POS, REWINDS, START_POS, TOKENS
from llm_coreml.artifact.method_plan import Constant
from llm_coreml.config import Shapes
from llm_coreml.decoder import Decoder, DecoderSpec
from llm_coreml.decoder.parts import Part
from llm_coreml.lower.padded import Method, Padded


class _Past(nn.Module):
    """A decoder that is given its caches; the program calls them `PAST` and their names.

    torch makes these names of the argument's and of the keys.
    """

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(
        self,
        tokens: torch.Tensor,
        past: Mapping[str, torch.Tensor],
        start_pos: torch.Tensor,
        last_pos: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        return self.decoder.carrying(tokens, start_pos, last_pos, list(past.values()))


def trace_program(
    decoder: Decoder,
    lengths: Sequence[int],
    ranged: bool = False,
    caches: Mapping[str, torch.Tensor] = MappingProxyType({}),
) -> ExportedProgram:
    """Export `forward(tokens int32 [1, P], start_pos int32 [1], last_pos int32 [1])`.

    torch never lets a symbol be 1 here, so its range begins at 2; nothing in the graph depends on
    it.

    Args:
        decoder: What to export.
        lengths: What P may be, ascending: 1 alone, then without `last_pos`, one more, or else any
            up to the context.
        ranged: P may be anything up to the last of them, and the program says so.
        caches: What the program takes behind the tokens, and gives behind the logits, by name;
            none if its caches are states.
    """
    longest = lengths[-1]
    module = _Past(decoder) if caches else decoder
    positions = [torch.zeros(1, dtype=torch.int32) for _ in range(2 if longest > 1 else 1)]
    rest = (*([dict(caches)] if caches else []), *positions)
    fixed = tree_map(lambda _: None, rest)
    if len(lengths) == 1:
        tokens = torch.zeros(1, longest, dtype=torch.int32)
        return _export(module, (tokens, *rest), (None, *fixed))
    tokens = torch.zeros(1, max(2, longest // 2), dtype=torch.int32)
    symbols = {1: Dim.AUTO(min=1, max=longest if ranged else decoder.context)}
    exported = _export(module, (tokens, *rest), (symbols, *fixed))
    if ranged:
        # Core ML is told what the graph takes, not what torch could prove of it.
        for symbol in exported.range_constraints:
            exported.range_constraints[symbol] = ValueRanges(1, longest)
    return exported


def trace_part(
    part: Part,
    width: int | None,
    lengths: Sequence[int],
    ranged: bool = False,
    caches: Mapping[str, torch.Tensor] = MappingProxyType({}),
    weights: Mapping[str, torch.Tensor] = MappingProxyType({}),
) -> ExportedProgram:
    """Export a part of a decoder, as `trace_program` does the whole.

    Args:
        part: What to export; it takes what `Share` tells.
        width: Of the rows that it is given, `hidden [1, P, width]`; None if it is given tokens.
        lengths: What P may be, see `trace_program`; of what is given one row alone, 1.
        ranged: See `trace_program`.
        caches: Those of its own layers.
        weights: See `Part.forward`; the program takes them before anything else. None if it has
            them itself.
    """
    longest, several = lengths[-1], len(lengths) > 1
    length = max(2, longest // 2) if several else longest
    if width is None:
        given = {TOKENS: torch.zeros(1, length, dtype=torch.int32)}
    else:
        given = {HIDDEN: torch.zeros(1, length, width, dtype=part.border)}
    symbol = Dim.AUTO(min=1, max=longest if ranged else part.decoder.context)
    shapes: dict[str, Any] = {name: {1: symbol} if several else None for name in given}
    rest: dict[str, Any] = {"past": dict(caches)} if caches else {}
    handed: dict[str, Any] = {"weights": dict(weights)} if weights else {}
    if part.share.takes_positions(part.decoder.spec):
        names = (START_POS, LAST_POS) if longest > 1 else (START_POS,)
        rest |= {name: torch.zeros(1, dtype=torch.int32) for name in names}
    shapes |= tree_map(lambda _: None, {**handed, **rest})
    exported = _export(part, (), shapes, {**handed, **given, **rest})
    if ranged and several:
        for constrained in exported.range_constraints:
            exported.range_constraints[constrained] = ValueRanges(1, longest)
    return exported


def name_results(exported: ExportedProgram, names: Sequence[str]) -> None:
    """Have a program call its results so, and not by the operations that they come from.

    Args:
        exported: Its first results are called otherwise from now on.
        names: None of which is an input's.
    """
    given = [
        spec
        for spec in exported.graph_signature.output_specs
        if spec.kind == OutputKind.USER_OUTPUT
    ]
    (nodes,) = exported.graph.output_node().args
    by_name = {node.name: node for node in nodes}
    for spec, name in zip(given, names, strict=False):
        node = by_name[spec.arg.name]
        node._rename(name)
        spec.arg.name = node.name


def trace_method(
    method: Method, longest: int, caches: Sequence[torch.Tensor] = ()
) -> ExportedProgram:
    """Export `forward(tokens int64 [1, S], start_pos int64 [1], *caches)`.

    Args:
        method: What is called.
        longest: S is 1 to this.
        caches: Of the types and sizes of those that it takes.
    """
    tokens = torch.zeros(1, longest, dtype=torch.int64)
    symbols = {1: Dim("S", min=1, max=longest)} if longest > 1 else None
    if isinstance(method, Padded) and method.lengths is None:
        # What is inside is traced with it, see `trace_program`.
        symbols = {1: Dim.AUTO(min=1, max=longest)}
    # What `forward` takes as one is told as one.
    fixed = [None, tuple(None for _ in caches)] if caches else [None]
    given = (tokens, torch.zeros(1, dtype=torch.int64), *caches)
    return _export(method, given, (symbols, *fixed))


def _export(
    module: nn.Module,
    inputs: tuple[Any, ...],
    shapes: tuple[Any, ...] | dict[str, Any],
    named: Mapping[str, Any] = MappingProxyType({}),
) -> ExportedProgram:
    with torch.no_grad():
        return torch.export.export(
            module.eval(), inputs, dict(named), dynamic_shapes=shapes, strict=False
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
        "enable_dynamic_shape": shapes.longest > 1,
    }
    rewinds = spec.rewinds(shapes.extent)
    if rewinds is not None:
        methods[REWINDS] = rewinds
    if bos_id is not None:
        methods["get_bos_id"] = bos_id
    if eos_ids:
        methods["get_eos_ids"] = list(eos_ids)
    return methods
