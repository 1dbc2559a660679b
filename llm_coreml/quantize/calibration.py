"""Quantize a decoder block by block, each on what the quantized blocks before it make of a text.

    calibration = Calibration(decoder, windows)
    for index in range(len(decoder.layers)):
        calibration.quantize(index, IntGroup(4, 32))

Only hidden states pass from block to block, so that a block's weights are needed once, and only
while it is their turn.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from llm_coreml.decoder import Decoder
from llm_coreml.errors import CheckpointError, UnsupportedError
from llm_coreml.quantize.gptq import damped, gptq
from llm_coreml.quantize.grids import grid_of
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


class Calibration:
    """A text on its way through a decoder.

    Args:
        decoder: Its token table is read now, and each block in its turn.
        windows: Tokens of the text; each window fits the cache.
    """

    def __init__(self, decoder: Decoder, windows: Sequence[Sequence[int]]) -> None:
        self._decoder = decoder
        with torch.inference_mode():
            self._states = [decoder.embed_tokens(torch.tensor([list(w)])) for w in windows]

    def quantize(self, index: int, scheme: Scheme) -> None:
        """Replace the weights of the linear layers of a block, and let the text pass it.

        Args:
            index: Of the block; they come in order.
            scheme: The format.

        Raises:
            CheckpointError: the inputs of a layer are not finite.
            UnsupportedError: the format cannot hold a value.
        """
        for names in SHARED_INPUTS:
            hessian = self.hessian(index, names[0])
            for name in names:
                linear = self._decoder.layers[index].get_submodule(name)
                try:
                    calibrate_weight(linear, scheme, hessian)
                except (CheckpointError, UnsupportedError) as error:
                    raise type(error)(f"layers.{index}.{name}: {error}") from error
        self._states = [self._forward(index, states) for states in self._states]

    def hessian(self, index: int, name: str) -> torch.Tensor:
        """Return the mean outer product of the inputs that a linear layer gets with themselves.

        Args:
            index: Of the block that the text has come to.
            name: Of the layer in the block.

        Returns:
            fp64 `[in_features, in_features]`.

        Raises:
            CheckpointError: the inputs are not finite.
        """
        linear = self._decoder.layers[index].get_submodule(name)
        assert isinstance(linear, nn.Linear)
        total = torch.zeros(linear.in_features, linear.in_features, dtype=torch.float64)

        def collect(_: nn.Module, inputs: tuple[torch.Tensor]) -> None:
            rows = inputs[0][0].to(torch.float64)
            total.addmm_(rows.T, rows)
            raise _Collected

        handle = linear.register_forward_pre_hook(collect)
        try:
            for states in self._states:
                try:
                    self._forward(index, states)
                except _Collected:
                    continue
        finally:
            handle.remove()
        if not bool(torch.isfinite(total).all()):
            raise CheckpointError(
                f"layers.{index}.{name} gets inf or NaN when the model reads the calibration text; "
                "the checkpoint overflows, or is damaged. Download or save it again, or export "
                "without --calibrate."
            )
        count: int = sum(states.shape[1] for states in self._states)
        return total / count

    def _forward(self, index: int, states: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            chunk = self._decoder.chunk(states.shape[1], torch.zeros(1, dtype=torch.int64))
            result: torch.Tensor = self._decoder.layers[index](states, chunk)
        return result


def calibrate_weight(linear: nn.Module, scheme: Scheme, hessian: torch.Tensor) -> None:
    """Replace `linear.weight` `[out, in]` by its form quantized for inputs of this `hessian`."""
    weight = linear.get_parameter("weight").detach().to(torch.float32)
    importance = damped(hessian).diagonal().to(torch.float32)
    grid = grid_of(scheme, weight, importance)
    codes = gptq(weight, hessian, grid)
    linear.weight = nn.Parameter(grid.tensor(codes), requires_grad=False)
