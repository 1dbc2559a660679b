"""The twin: the same decoder for XNNPACK, so that ExecuTorch's stock runner runs it on Linux.

It proves the contract of the method (inputs, cache, constant methods, tokenizer), not the Core ML
program. XNNPACK holds none of the weight formats, so the twin stores the dequantized values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import (
    EdgeCompileConfig,
    ExecutorchBackendConfig,
    to_edge_transform_and_lower,
)
from executorch.exir.passes.init_mutable_pass import InitializedMutableBufferPass
from torch import nn
from torch._library.custom_ops import CustomOpDef
from torchao.utils import TorchAOBaseTensor

from llm_coreml.artifact.method_plan import Constant
from llm_coreml.decoder import Decoder
from llm_coreml.decoder.caches import kv_write, ring_places, ring_write
from llm_coreml.decoder.states import state_specs
from llm_coreml.lower.padded import Carrying, method_around
from llm_coreml.lower.signature import empty
from llm_coreml.lower.traced import trace_method


def _kv_write(
    cache: torch.Tensor, update: torch.Tensor, layer: int, start_pos: torch.Tensor
) -> torch.Tensor:
    """`llm_coreml::kv_write` in ATen ops, for which portable kernels exist."""
    return _put(cache, update, layer, start_pos.to(torch.int64) + torch.arange(update.shape[2]))


def _ring_write(
    cache: torch.Tensor, update: torch.Tensor, layer: int, place: torch.Tensor, length: int
) -> torch.Tensor:
    """`llm_coreml::ring_write` in ATen ops."""
    return _put(cache, update, layer, ring_places(place, length, cache.shape[2]))


def _put(
    cache: torch.Tensor, update: torch.Tensor, layer: int, places: torch.Tensor
) -> torch.Tensor:
    written = torch.ops.aten.index_put.default(cache[layer], [None, places], update[0])
    return torch.select_scatter(cache, written, 0, layer)


# The op that writes each kind of state -> the same in ops for which portable kernels exist.
WRITES: Mapping[CustomOpDef, Callable[..., torch.Tensor]] = MappingProxyType(
    {kv_write: _kv_write, ring_write: _ring_write}
)


def _dequantize(decoder: Decoder) -> None:
    done: dict[int, nn.Parameter] = {}
    for module in decoder.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            weight = module.weight
            if id(weight) not in done:
                dense = weight.dequantize() if isinstance(weight, TorchAOBaseTensor) else weight
                values = dense.detach().to(torch.float32)
                done[id(weight)] = nn.Parameter(values, requires_grad=False)
            module.weight = done[id(weight)]


def lower_xnnpack(
    decoder: Decoder,
    lengths: Sequence[int],
    constants: Mapping[str, Constant],
    caches: Mapping[str, str],
    path: Path,
) -> None:
    """Write the twin's program to `path`. `decoder` is left with dequantized weights.

    Args:
        decoder: Quantized decoder.
        lengths: What a call may have, ascending.
        constants: Constant methods, see `traced.constant_methods`.
        caches: Element type and shape of those that are inputs and outputs, by name.
        path: Where to write the `.pte`.
    """
    _dequantize(decoder)
    longest = lengths[-1]
    padding = lengths if longest == 1 else None  # XNNPACK takes every length
    program = Carrying(decoder) if caches else decoder
    method = method_around(program, decoder.context, padding, int(decoder.logits == "all"))
    traced = trace_method(method, longest, list(empty(caches).values()))
    writes = {state.write for state in decoder.states.values()}
    exported = traced.run_decompositions({write._opoverload: WRITES[write] for write in writes})
    edge = to_edge_transform_and_lower(
        exported,
        partitioner=[XnnpackPartitioner()],
        compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True),
        constant_methods=dict(constants),
    )
    # Without this the cache begins with whatever is in memory, and a masked NaN is still a NaN.
    states = state_specs(decoder.spec, decoder.extent)
    zeros = InitializedMutableBufferPass([state.name for state in states])
    lowered = edge.to_executorch(ExecutorchBackendConfig(passes=[] if caches else [zeros]))
    with path.open("wb") as file:
        lowered.write_to_file(file)
