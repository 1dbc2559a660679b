"""What each format of each matrix would cost the model: KL divergence on a text, to second order.

    losses = sensitivities(weights, spec, windows, options)
    losses["layers.0.mlp.down_proj"]                       # one per format, in nats per token

A change E of a weight moves the outputs of its layer by E x, and the logits by J E x. The
divergence of the changed predictions is half the square of that in the metric diag(p) - p p^T (the
Fisher information). Its root times random signs, taken back through the network, gives for every
output a vector g with which the divergence is the mean of (g . E x)^2 / 2 over tokens and signs
(Hutchinson's estimator). So every format of every matrix is priced by one pass forward and one
back, a block at a time, whatever the number of formats.

Errors made at one position are taken not to meet those made at others, which keeps the estimate
from being noise; `benchmarks/mixed_bits.py` holds it against divergences that were measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from llm_coreml.checkpoint.weights_view import Weights
from llm_coreml.decoder import Decoder, DecoderSpec
from llm_coreml.decoder.chunk import Chunk
from llm_coreml.errors import CheckpointError, UnsupportedError
from llm_coreml.quantize.formats.round import dense_rows, quantized
from llm_coreml.quantize.formats.schemes import Scheme

# Draws of signs for every token. Tokens are draws as well, so few are enough.
_DRAWS = 2
# Digits that are kept: what the order of fp32 sums changes is to change no choice.
_DIGITS = 4

Options = Mapping[str, Sequence[Scheme]]
Losses = dict[str, tuple[float, ...]]


def sensitivities(
    weights: Weights,
    spec: DecoderSpec,
    windows: Sequence[Sequence[int]],
    options: Options,
    on_progress: Callable[[float], None] = lambda _: None,
) -> Losses:
    """Estimate the mean KL divergence per token, in nats, that each format alone would cause.

    In memory are one block in fp32, the tables as stored, and the hidden states of the text before
    every block.

    Args:
        weights: Of a decoder of these sizes.
        spec: Sizes.
        windows: Tokens of a text, each window read on its own.
        options: Formats to price, for linear layers of the blocks by their name in the decoder.
        on_progress: Called with the share done, 0 to 1.

    Returns:
        For every name in `options` the losses of its formats, in their order.

    Raises:
        CheckpointError: a weight is not finite, or the losses are not.
        UnsupportedError: a format cannot hold a value.
    """
    stream = _Stream(weights, spec, max(map(len, windows)))
    count, losses = len(spec.layers), {}
    states = [stream.embed(windows)]
    for index in range(count):
        with stream.block(index) as block, torch.no_grad():
            states.append([block(x, stream.chunk(x)) for x in states[-1]])
        on_progress((index + 1) / (4 * count))
    gradients = stream.head_gradients(states.pop())
    for index in reversed(range(count)):
        with stream.block(index) as block:
            taps, gradients = _backward(block, stream, states.pop(), gradients)
            for name, (inputs, outputs) in taps.items():
                full = f"layers.{index}.{name}"
                weight = block.get_parameter(f"{name}.weight").detach()
                losses[full] = tuple(
                    _loss(full, weight, scheme, inputs, outputs) for scheme in options[full]
                )
        on_progress(1 - 3 * index / (4 * count))
    return losses


class _Stream:
    """An unquantized decoder of which one block is in memory at a time."""

    def __init__(self, weights: Weights, spec: DecoderSpec, context: int) -> None:
        self._weights = weights
        self._decoder = Decoder(spec, context)
        for name in sorted(weights.names()):
            if not name.startswith("layers."):
                self._load(name, weights.dtype(name))
        if spec.tie_word_embeddings:
            self._decoder.lm_head.weight = self._decoder.embed_tokens.weight

    def _load(self, name: str, dtype: torch.dtype) -> None:
        self._set(name, self._weights.tensor(name, dtype))

    def _set(self, name: str, values: torch.Tensor) -> None:
        owner, _, attribute = name.rpartition(".")
        parameter = nn.Parameter(values, requires_grad=False)
        setattr(self._decoder.get_submodule(owner), attribute, parameter)

    @contextmanager
    def block(self, index: int) -> Iterator[nn.Module]:
        """Hold a block in fp32."""
        block = self._decoder.layers[index]
        absent = dict(block.named_parameters(prefix=f"layers.{index}"))
        for name in absent:
            self._load(name, torch.float32)
        try:
            yield block
        finally:
            for name, nothing in absent.items():
                self._set(name, nothing)

    def embed(self, windows: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """Return the rows of the token table, `[1, S, hidden]` for each window."""
        with torch.no_grad():
            return [self._decoder.embed(torch.tensor([list(w)])) for w in windows]

    def chunk(self, states: torch.Tensor) -> Chunk:
        """Return what a block is told of a window."""
        return self._decoder.window(states.shape[1])

    def head_gradients(self, states: Sequence[torch.Tensor]) -> list[list[torch.Tensor]]:
        """Return roots of the metric for every window and draw, taken back through the head."""
        generator = torch.Generator().manual_seed(0)
        return [self._root(x.detach().requires_grad_(), generator) for x in states]

    def _root(self, states: torch.Tensor, generator: torch.Generator) -> list[torch.Tensor]:
        logits = self._decoder.head(states)
        found: list[torch.Tensor] = []
        with torch.no_grad():
            p = torch.softmax(logits, dim=-1)
        for _ in range(_DRAWS):
            signs = torch.randint(0, 2, p.shape, generator=generator, dtype=torch.int8)
            root = p.sqrt() * (2 * signs - 1)
            # The root of diag(p) - p p^T is sqrt(diag(p)) (1 - sqrt(p) sqrt(p)^T).
            root -= p * (p.sqrt() * (2 * signs - 1)).sum(dim=-1, keepdim=True)
            found += torch.autograd.grad(logits, states, root, retain_graph=True)
        return found


Taps = dict[str, tuple[torch.Tensor, torch.Tensor]]


def _backward(
    block: nn.Module,
    stream: _Stream,
    states: Sequence[torch.Tensor],
    gradients: Sequence[Sequence[torch.Tensor]],
) -> tuple[Taps, list[list[torch.Tensor]]]:
    """Take gradients back through a block.

    Args:
        block: With its weights.
        stream: Tells it of each window.
        states: What it gets, `[1, S, hidden]` for each window.
        gradients: Of what it gives, for every window and draw.

    Returns:
        For every linear layer its inputs `[tokens, in]` and the gradients of its outputs
        `[draws, tokens, out]`; and the gradients of `states`.
    """
    linears = {n: module for n, module in block.named_modules() if isinstance(module, nn.Linear)}
    inputs: dict[str, list[torch.Tensor]] = {name: [] for name in linears}
    outputs: dict[str, list[torch.Tensor]] = {name: [] for name in linears}
    before = []
    for x, draws in zip(states, gradients, strict=True):
        x = x.detach().requires_grad_()
        seen = _seen(block, linears, x, stream.chunk(x))
        ends = [x, *(seen[name][1] for name in linears)]
        found = [
            torch.autograd.grad(seen[""][1], ends, gradient, retain_graph=True)
            for gradient in draws
        ]
        before.append([gradient for gradient, *_ in found])
        for at, name in enumerate(linears, start=1):
            inputs[name].append(seen[name][0][0].detach())
            outputs[name].append(torch.stack([gradient[at][0] for gradient in found]))
    taps = {n: (torch.cat(inputs[n]), torch.cat(outputs[n], dim=1)) for n in linears}
    return taps, before


def _seen(
    block: nn.Module, linears: Mapping[str, nn.Module], x: torch.Tensor, chunk: Chunk
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return what every linear layer of a block gets and gives; the block's own are at ``."""
    seen = {}

    def tap(name: str) -> Callable[..., None]:
        def keep(_: nn.Module, given: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            seen[name] = (given[0], output)

        return keep

    handles = [
        module.register_forward_hook(tap(name)) for name, module in {**linears, "": block}.items()
    ]
    try:
        block(x, chunk)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _loss(
    name: str,
    weight: torch.Tensor,
    scheme: Scheme,
    inputs: torch.Tensor,
    outputs: torch.Tensor,
) -> float:
    """Return the mean of `(g . E x)^2 / 2` for the error E that a format makes."""
    try:
        stored = torch.cat(list(dense_rows(quantized(scheme, weight))))
    except UnsupportedError as error:
        raise UnsupportedError(f"{name}: {error}") from error
    moved = inputs @ (stored - weight).T
    projected = torch.einsum("dto,to->dt", outputs, moved).to(torch.float64)
    loss = float(projected.square().mean() / 2)
    if not loss < float("inf"):
        raise CheckpointError(
            f"{name} gets inf or NaN when the model reads the calibration text; the checkpoint "
            "overflows, or is damaged. Download or save it again, or give whole --bits, which "
            "need no text."
        )
    return float(f"{loss:.{_DIGITS - 1}e}")
