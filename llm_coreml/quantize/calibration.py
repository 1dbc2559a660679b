"""Quantize a decoder block by block, each on what the quantized blocks before it make of a text.

    calibration = Calibration(decoder, windows)
    for index in range(len(decoder.layers)):
        calibration.quantize(index, plan.scheme_of)

Only hidden states pass from block to block, so that a block's weights are needed once, and only
while it is their turn. Beside them go those of the unquantized model, from which the error of
earlier blocks is known, and can be made up for (as in GPTAQ, arXiv:2504.02692).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import nn

from llm_coreml.decoder import Decoder
from llm_coreml.errors import CheckpointError, UnsupportedError
from llm_coreml.quantize.gptq import damped, gptq
from llm_coreml.quantize.grids import grid_of
from llm_coreml.quantize.refit import refit
from llm_coreml.quantize.schemes import Scheme

# Linear layers that get the same inputs, in the order in which a block computes them: each sees
# what the quantized ones before it give.
SHARED_INPUTS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)


class _Collected(Exception):
    """The layer whose inputs are wanted has got them; the rest of the block is not computed."""

    def __init__(self, inputs: torch.Tensor) -> None:
        self.inputs = inputs


class Moments(NamedTuple):
    """What a layer's inputs are like, fp64 `[in_features, in_features]`, means over tokens.

    Attributes:
        hessian: Outer products of the inputs with themselves.
        drift: Outer products with the inputs of how far the unquantized model's are from them.
    """

    hessian: torch.Tensor
    drift: torch.Tensor


class Calibration:
    """A text on its way through a decoder, and through the decoder without quantized blocks.

    Args:
        decoder: Its token table is read now, and each block in its turn.
        windows: Tokens of the text; each window fits the cache.
    """

    def __init__(self, decoder: Decoder, windows: Sequence[Sequence[int]]) -> None:
        self._decoder = decoder
        with torch.inference_mode():
            self._states = [decoder.embed_tokens(torch.tensor([list(w)])) for w in windows]
        self._originals = list(self._states)

    def quantize(self, index: int, scheme_of: Callable[[str], Scheme]) -> None:
        """Replace the weights of the linear layers of a block, and let the text pass it.

        Args:
            index: Of the block; they come in order.
            scheme_of: The format of each linear layer, by its name in the decoder.

        Raises:
            CheckpointError: the inputs of a layer are not finite.
            UnsupportedError: the format cannot hold a value.
        """
        block = self._decoder.layers[index]
        original = copy.deepcopy(block)
        for names in SHARED_INPUTS:
            moments = self._moments(block, original, names[0])
            if not all(bool(torch.isfinite(moment).all()) for moment in moments):
                raise CheckpointError(
                    f"layers.{index}.{names[0]} gets inf or NaN when the model reads the "
                    "calibration text; the checkpoint overflows, or is damaged. Download or save "
                    "it again, or export without --calibrate."
                )
            for name in names:
                full = f"layers.{index}.{name}"
                try:
                    calibrate_weight(block.get_submodule(name), scheme_of(full), moments)
                except (CheckpointError, UnsupportedError) as error:
                    raise type(error)(f"{full}: {error}") from error
        self.advance(block, original)

    def advance(self, block: nn.Module, original: nn.Module) -> None:
        """Let the text pass a block, quantized and as it was."""
        self._states = [self._forward(block, states) for states in self._states]
        self._originals = [self._forward(original, states) for states in self._originals]

    def _moments(self, block: nn.Module, original: nn.Module, name: str) -> Moments:
        """Return what the text makes of the inputs of a linear layer of a block."""
        linear = block.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        size, count = linear.in_features, 0
        hessian, drift = torch.zeros(2, size, size, dtype=torch.float64)
        for states, others in zip(self._states, self._originals, strict=True):
            inputs = self._inputs(block, name, states)
            away = self._inputs(original, name, others) - inputs
            hessian += inputs.T @ inputs
            drift += away.T @ inputs
            count += len(inputs)
        return Moments(hessian / count, drift / count)

    def _inputs(self, block: nn.Module, name: str, states: torch.Tensor) -> torch.Tensor:
        """Return what a layer gets when its block gets `states`: fp64 `[tokens, in_features]`."""

        def collect(_: nn.Module, inputs: tuple[torch.Tensor]) -> None:
            raise _Collected(inputs[0][0].to(torch.float64))

        handle = block.get_submodule(name).register_forward_pre_hook(collect)
        try:
            self._forward(block, states)
        except _Collected as collected:
            return collected.inputs
        finally:
            handle.remove()
        raise AssertionError(f"the block has no use for {name}")

    def _forward(self, block: nn.Module, states: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            chunk = self._decoder.chunk(states.shape[1], torch.zeros(1, dtype=torch.int64))
            result: torch.Tensor = block(states, chunk)
        return result


def calibrate_weight(linear: nn.Module, scheme: Scheme, moments: Moments) -> None:
    """Replace `linear.weight` `[out, in]` by its form quantized for such inputs.

    What it is to come close to is not what the weight makes of these inputs, but what it would make
    of the unquantized model's, as far as a linear guess from these tells them. So later layers make
    up for earlier ones.
    """
    weight = linear.get_parameter("weight").detach().to(torch.float64)
    mean = moments.hessian.diagonal().mean() or 1.0  # of a size that fp32 holds
    hessian = moments.hessian / mean
    guess = weight @ (moments.drift / mean)
    target = (weight + torch.linalg.solve(damped(hessian), guess, left=False)).to(torch.float32)
    importance = damped(hessian).diagonal().to(torch.float32)
    grid = grid_of(scheme, target, importance)
    quantized = grid.tensor(gptq(target, hessian, grid))
    fitted = refit(quantized, target, damped(hessian).to(torch.float32))
    linear.weight = nn.Parameter(fitted, requires_grad=False)
