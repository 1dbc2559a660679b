"""PT2E: what ExecuTorch's `CoreMLQuantizer` makes of the blocks' exported graph, in 8 bits.

    pt2e_weights(decoder)                          # int8 linear layers
    pt2e_static(decoder, text.windows)             # and 8-bit inputs and outputs, as on that text

The blocks are exported, prepared, run and converted as ExecuTorch's recipes do it
(`PT2E_INT8_WEIGHT_ONLY` and `PT2E_INT8_STATIC`: symmetric, a scale for each row of a weight, one
for an activation). What the converted graph holds then becomes the decoder's own: codes of
weights, and roundings of what linear layers get and give. So lowering, verification and
evaluation meet what they know; scales are rounded to fp16, as Core ML stores them.

The recipe rounds every sum and product too, the residual stream and attention's masks among them,
which leaves nothing of a language model. Here these stay as they are.

The whole model stands in fp32 meanwhile.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import coremltools as ct
import torch
from executorch.backends.apple.coreml.quantizer import CoreMLQuantizer
from executorch.backends.apple.coreml.quantizer._annotation_config import AnnotationConfig
from executorch.backends.apple.coreml.quantizer._coreml_quantizer import _AnnotationPatternRegistry
from torch import nn
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

from llm_coreml.decoder import Decoder
from llm_coreml.decoder.chunk import Chunk
from llm_coreml.decoder.eight_bit import EightBit
from llm_coreml.decoder.matrices import Linear
from llm_coreml.decoder.mlp import MLP
from llm_coreml.errors import CheckpointError, UnsupportedError
from llm_coreml.quantize.formats.tensors import integer_tensor

# Weights are observed, whatever passes them by.
_TOKENS = 8
_LINEAR = torch.ops.aten.linear.default
_ROUND, _BACK, _WEIGHT = "quantize_per_tensor", "dequantize_per_tensor", "dequantize_per_channel"
_SMALLEST_SCALE = float(torch.finfo(torch.float16).smallest_normal)
_LARGEST_SCALE = float(torch.finfo(torch.float16).max)
# Activations that are one operation of the graph.
_WHOLE = ("silu", "gelu", "gelu_tanh", "relu")
Windows = Sequence[Sequence[int]]


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


class _LinearLayers(CoreMLQuantizer):  # type: ignore[misc]
    """ExecuTorch's quantizer, of whose patterns those of linear layers are looked for.

    Each of the others takes a second or so to be traced, for every form that it has.
    """

    def _annotate_all_patterns(
        self,
        model: GraphModule,
        quantization_config: Any,
        filter_fn: Callable[[Node], bool] | None = None,
    ) -> None:
        annotators = _AnnotationPatternRegistry.get_annotators()
        config = AnnotationConfig.from_quantization_config(quantization_config)
        rounds = config is not None and config.output_activation is not None
        for name in ("linear_act", "linear") if rounds else ("linear",):
            annotators[name](model, config, filter_fn)


@dataclass(frozen=True)
class Rounded:
    """A linear layer as the converted graph has it.

    Attributes:
        name: In the decoder.
        codes: int8 `[rows, columns]`.
        scale: `[rows, 1]`.
        zero_point: `[rows, 1]`.
        entering: Scale and zero point of its inputs; None if they are not rounded.
        leaving: The same of its outputs.
        activated: The same of what an activation makes of them.
    """

    name: str
    codes: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor
    entering: EightBit | None
    leaving: EightBit | None
    activated: EightBit | None


def pt2e_weights(decoder: Decoder) -> None:
    """Give the linear layers of the blocks the codes that PT2E finds.

    Args:
        decoder: Unquantized; changed in place.

    Raises:
        UnsupportedError: fp16 cannot hold a scale, or a layer is not found in the graph.
    """
    length = min(_TOKENS, decoder.context)
    tokens = [number % decoder.spec.vocab_size for number in range(length)]
    _take_over(decoder, *converted_blocks(decoder, [tokens], torch.float32))


def pt2e_static(decoder: Decoder, windows: Windows) -> None:
    """Give the linear layers of the blocks codes, and roundings that fit what a text makes of them.

    Args:
        decoder: Unquantized; changed in place.
        windows: Tokens of the text, each window read on its own; one that is shorter than the first
            is left out.

    Raises:
        CheckpointError: an activation is not finite.
        UnsupportedError: fp16 cannot hold a scale, or a layer is not found in the graph.
    """
    _take_over(decoder, *converted_blocks(decoder, windows, torch.quint8))


@torch.no_grad()
def converted_blocks(
    decoder: Decoder, windows: Windows, activations: torch.dtype
) -> tuple[GraphModule, dict[str, str]]:
    """Return the quantized blocks as PT2E has them, and names of layers by those of their nodes.

    Args:
        decoder: Its weights are fp32 afterwards.
        windows: What is read, see `pt2e_static`.
        activations: torch.quint8, or torch.float32 to leave them as they are.
    """
    for module in decoder.layers.modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(module.weight.to(torch.float32), requires_grad=False)
    length = len(windows[0])
    read = [torch.tensor([list(each)]) for each in windows if len(each) == length]
    states = [decoder.embed(tokens) for tokens in read]
    exported = torch.export.export(_Blocks(decoder, length), (states[0],), strict=False)
    graph = exported.module(check_guards=False)
    layers = {
        node.name: str(node.args[1].target).removesuffix(".weight") for node in _linears(graph)
    }
    prepared = prepare_pt2e(graph, _LinearLayers(_config(activations)))
    for x in states:
        prepared(x)
    return convert_pt2e(prepared), layers


def rounded_layers(converted: GraphModule, layers: dict[str, str]) -> Iterator[Rounded]:
    """Yield every linear layer of a converted graph.

    Raises:
        UnsupportedError: a layer's weight is not quantized.
    """
    for node in _linears(converted):
        expanded = node.args[1]
        if not isinstance(expanded, Node) or _WEIGHT not in str(expanded.target):
            raise UnsupportedError(
                f"PT2E left {layers.get(node.name, node.name)} unquantized; give --scheme "
                "int8-channel, and report the model."
            )
        codes, scale, zero_point = (_held(converted, part) for part in expanded.args[:3])
        entering = node.args[0]
        inner = entering.args[0] if _calls(entering, _BACK) else None
        behind = [user for user in node.users if _is_activation(user)]
        name = layers[node.name]
        yield Rounded(
            name,
            codes,
            scale.unsqueeze(1),
            zero_point.unsqueeze(1),
            None if inner is None else _rounding(converted, inner, f"what {name} reads"),
            _behind(converted, node, f"what {name} gives"),
            _behind(converted, behind[0], f"the activation of {name}") if behind else None,
        )


def _take_over(decoder: Decoder, converted: GraphModule, layers: dict[str, str]) -> None:
    """Give a decoder what a converted graph holds."""
    for found in rounded_layers(converted, layers):
        module = decoder.get_submodule(found.name)
        assert isinstance(module, Linear)
        try:
            zero = found.zero_point.to(torch.int8) if bool(found.zero_point.any()) else None
            weight = integer_tensor(found.codes, found.scale, zero, bits=8)
        except UnsupportedError as error:
            raise UnsupportedError(f"{found.name}: {error}") from error
        module.weight = nn.Parameter(weight, requires_grad=False)
        module.entering, module.leaving = found.entering, found.leaving
        if found.activated is not None:
            around = decoder.get_submodule(found.name.rpartition(".")[0])
            if not isinstance(around, MLP) or around.spec.activation not in _WHOLE:
                raise UnsupportedError(
                    f"PT2E rounds an activation behind {found.name}, which has no place for it; "
                    "give --pt2e weights."
                )
            around.activated = found.activated


def _config(activations: torch.dtype) -> Any:
    """Return the configuration of ExecuTorch's recipes."""
    quantization = ct.optimize.torch.quantization
    everything = quantization.ModuleLinearQuantizerConfig(
        quantization_scheme="symmetric",
        activation_dtype=activations,
        weight_dtype=torch.qint8,
        weight_per_channel=True,
    )
    return quantization.LinearQuantizerConfig(global_config=everything)


def _behind(graph: GraphModule, node: Node, what: str) -> EightBit | None:
    """Return how what a node gives is rounded for all that read it; None if it is not."""
    found = [user for user in node.users if _calls(user, _ROUND)]
    return _rounding(graph, found[0], what) if found else None


def _rounding(graph: GraphModule, node: Node, what: str) -> EightBit:
    """Return the rounding of a node that makes codes.

    Args:
        graph: Where it is.
        node: The node.
        what: What it rounds, for errors.

    Raises:
        CheckpointError: what was read there is not finite.
        UnsupportedError: fp16, which Core ML stores scales as, does not hold its scale.
    """
    given: tuple[Any, ...] = node.args[1:3]
    scale, zero_point = (
        float(_held(graph, part)) if isinstance(part, Node) else float(part) for part in given
    )
    if not 0 < scale < float("inf"):
        raise CheckpointError(
            f"The calibration text makes inf or NaN of {what}; the checkpoint overflows, or is "
            "damaged. Give --pt2e weights, which reads none."
        )
    if scale > _LARGEST_SCALE:
        raise UnsupportedError(
            f"{what[0].upper()}{what[1:]} spans {255 * scale:,.0f} on the calibration text, so "
            f"that a step of 8 bits is {scale:,.0f}, and Core ML stores it as fp16, which ends at "
            "65,504. Give --pt2e weights, which rounds no activations."
        )
    held = torch.tensor(max(scale, _SMALLEST_SCALE)).to(torch.float16)
    return EightBit(float(held), int(zero_point))


def _linears(graph: Any) -> Iterator[Any]:
    return (node for node in graph.graph.nodes if node.target is _LINEAR)


def _calls(node: object, name: str) -> bool:
    return isinstance(node, Node) and f".{name}." in f".{node.target}."


def _is_activation(node: Node) -> bool:
    return any(_calls(node, name) for name in ("silu", "gelu", "relu", "sigmoid", "tanh"))


def _held(graph: GraphModule, node: Any) -> torch.Tensor:
    """Return the tensor that a node reads from the module."""
    read: Callable[[Any], torch.Tensor] = operator.attrgetter(str(node.target))
    return read(graph).detach()
