"""PT2E weight-only: int8 codes that ExecuTorch's `CoreMLQuantizer` chooses in the exported graph.

    pt2e_weights(decoder)                          # its linear layers hold the codes from then on

The blocks are exported, prepared, run once and converted as ExecuTorch's recipe does it
(`PT2E_INT8_WEIGHT_ONLY`: symmetric, a scale for each row). The converted graph's codes then become
the decoder's own weights, so that lowering, verification and evaluation meet what they know; scales
are rounded to fp16, as Core ML stores them.

The whole model stands in fp32 meanwhile.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

import coremltools as ct
import torch
from executorch.backends.apple.coreml.quantizer import CoreMLQuantizer
from torch import nn
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

from llm_coreml.decoder import Decoder
from llm_coreml.decoder.chunk import Chunk
from llm_coreml.errors import UnsupportedError
from llm_coreml.quantize.formats.tensors import integer_tensor

# Weights are observed, whatever passes them by.
_TOKENS = 8
_LINEAR = torch.ops.aten.linear.default
_DEQUANTIZE = "dequantize_per_channel"


class _Blocks(nn.Module):
    """The blocks of a decoder on a window of tokens, without states."""

    def __init__(self, decoder: Decoder, length: int) -> None:
        super().__init__()
        self.layers = decoder.layers
        self._chunk: Chunk = decoder.window(length)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return what the last block gives for what the first gets, `[1, length, hidden]`."""
        for block in self.layers:
            x = block(x, self._chunk)
        return x


def pt2e_weights(decoder: Decoder) -> None:
    """Give the linear layers of the blocks the codes that PT2E finds.

    Args:
        decoder: Unquantized; changed in place.

    Raises:
        UnsupportedError: fp16 cannot hold a scale, or a layer is not found in the graph.
    """
    with torch.no_grad():
        converted, layers = converted_blocks(decoder)
        for name, codes, scale, zero_point in found_codes(converted, layers):
            module = decoder.get_submodule(name)
            zero = zero_point.to(torch.int8) if bool(zero_point.any()) else None
            try:
                weight = integer_tensor(codes, scale, zero, bits=8)
            except UnsupportedError as error:
                raise UnsupportedError(f"{name}: {error}") from error
            module.weight = nn.Parameter(weight, requires_grad=False)


def converted_blocks(decoder: Decoder) -> tuple[GraphModule, dict[str, str]]:
    """Return the quantized blocks as PT2E has them, and names of layers by those of their nodes.

    Args:
        decoder: Its weights are fp32 afterwards.
    """
    for module in decoder.layers.modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(module.weight.to(torch.float32), requires_grad=False)
    length = min(_TOKENS, decoder.context)
    x = decoder.embed(
        torch.arange(length, dtype=torch.int32).unsqueeze(0) % decoder.spec.vocab_size
    )
    graph = torch.export.export(_Blocks(decoder, length), (x,), strict=False).module()
    layers = {
        node.name: str(node.args[1].target).removesuffix(".weight") for node in _linears(graph)
    }
    prepared = prepare_pt2e(graph, CoreMLQuantizer(_weights_config()))
    prepared(x)
    return convert_pt2e(prepared), layers


def found_codes(
    converted: GraphModule, layers: dict[str, str]
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Yield every layer with its codes, int8 `[rows, columns]`, scales and zero points `[rows, 1]`.

    Raises:
        UnsupportedError: a layer's weight is not quantized.
    """
    for node in _linears(converted):
        expanded = node.args[1]
        if not isinstance(expanded, Node) or _DEQUANTIZE not in str(expanded.target):
            raise UnsupportedError(
                f"PT2E left {layers.get(node.name, node.name)} unquantized; give --scheme "
                "int8-channel, and report the model."
            )
        codes, scale, zero_point = (
            _held(converted, part) for part in expanded.args[:3] if isinstance(part, Node)
        )
        yield layers[node.name], codes, scale.unsqueeze(1), zero_point.unsqueeze(1)


def _weights_config() -> Any:
    """Return the configuration of ExecuTorch's recipe for weights alone."""
    quantization = ct.optimize.torch.quantization
    everything = quantization.ModuleLinearQuantizerConfig(
        quantization_scheme="symmetric",
        activation_dtype=torch.float32,
        weight_dtype=torch.qint8,
        weight_per_channel=True,
    )
    return quantization.LinearQuantizerConfig(global_config=everything)


def _linears(graph: Any) -> Iterator[Any]:
    return (node for node in graph.graph.nodes if node.target is _LINEAR)


def _held(graph: GraphModule, node: Node) -> torch.Tensor:
    """Return the tensor that a node reads from the module."""
    read: Callable[[Any], torch.Tensor] = operator.attrgetter(str(node.target))
    return read(graph).detach()
