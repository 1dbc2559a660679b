"""Quantize a decoder block by block, each on what the quantized blocks before it make of a text.

    calibration = Calibration(decoder, windows)
    for index in range(len(decoder.layers)):
        calibration.quantize(index, plan.scheme_of)

Only hidden states pass from block to block, so that a block's weights are needed once, and only
while it is their turn. Beside them go those of the unquantized model, from which the error of
earlier blocks is known, and can be made up for (as in GPTAQ, arXiv:2504.02692).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from llm_coreml.decoder import Decoder
from llm_coreml.errors import CheckpointError, UnsupportedError
from llm_coreml.quantize.calibrate.gptq import gptq
from llm_coreml.quantize.calibrate.hessian import Hessian
from llm_coreml.quantize.calibrate.moments import Moments, Sums
from llm_coreml.quantize.calibrate.refit import refit
from llm_coreml.quantize.calibrate.stream import Passage, Texts, widened
from llm_coreml.quantize.formats.grids import grid_of
from llm_coreml.quantize.formats.schemes import Scheme

Codes = Callable[[torch.Tensor, Scheme], torch.Tensor]


class Calibration:
    """A text on its way through a decoder, and through the decoder without quantized blocks.

    Args:
        decoder: Its token table is read now, and each block in its turn.
        windows: Tokens of the text; each window fits the cache.
        codes: Gives a matrix and its format the codes that are kept; None chooses them.
    """

    def __init__(
        self,
        decoder: Decoder,
        windows: Sequence[Sequence[int]],
        codes: Codes | None = None,
    ) -> None:
        self._decoder = decoder
        self._codes = codes
        self._chunk_of = functools.cache(decoder.window)
        with torch.inference_mode():
            states = [decoder.embed(torch.tensor([list(w)])) for w in windows]
        self._texts = Texts(states, list(states))

    def quantize(self, index: int, scheme_of: Callable[[str], Scheme]) -> None:
        """Replace the weights of the linear layers of a block, and let the text pass it.

        Args:
            index: Of the block; they come in order.
            scheme_of: The format of each linear layer, by its name in the decoder.

        Raises:
            CheckpointError: the inputs of a layer are not finite.
            UnsupportedError: the format cannot hold a value.
        """
        block = self._decoder.block(index)
        passage = Passage(block, self._texts, self._chunk_of)
        for names in block.wiring.shared:
            owners = {f"layers.{index}.{name}": name for name in names}
            weights = {owner: passage.weight(name) for owner, name in owners.items()}
            moments = _moments(passage, weights)
            for owner, weight in calibrated(weights, scheme_of, moments, self._codes):
                passage.replace(owners[owner], weight)
                linear = block.get_submodule(owners[owner])
                linear.weight = nn.Parameter(weight, requires_grad=False)
        self._texts = passage.end()

    def advance(self, block: nn.Module, original: nn.Module) -> None:
        """Let the text pass a block, quantized and as it was."""
        states, originals = self._texts
        self._texts = Texts(self._passed(block, states), self._passed(original, originals))

    def _passed(self, block: nn.Module, states: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        dense = widened(block)
        with torch.inference_mode():
            return [dense(x, self._chunk_of(x.shape[1])) for x in states]


def _moments(passage: Passage, weights: Mapping[str, torch.Tensor]) -> Moments:
    """Return what the text makes of the inputs of layers, whose weights are `weights`."""
    sums = Sums(torch.cat(list(weights.values())))
    for inputs, others in passage.windows():
        sums.add(inputs, others)
    moments = sums.means()
    if not moments.finite():
        raise CheckpointError(
            f"{next(iter(weights))} gets inf or NaN when the model reads the calibration text; "
            "the checkpoint overflows, or is damaged. Download or save it again, or export "
            "without --calibrate."
        )
    return moments


def calibrated(
    weights: Mapping[str, torch.Tensor],
    scheme_of: Callable[[str], Scheme],
    moments: Moments,
    codes: Codes | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Quantize matrices for the inputs that they share.

    What a matrix is to come close to is not what it makes of these inputs, but what it would make
    of the unquantized model's, as far as a linear guess from these tells them. So later layers make
    up for earlier ones.

    Args:
        weights: fp32 `[out, in]`, by name.
        scheme_of: The format of each.
        moments: Of the inputs; the Hessian is damped in place.
        codes: See `Calibration`.

    Yields:
        Each name with the quantized matrix.

    Raises:
        CheckpointError: the inputs do not tell the columns apart.
        UnsupportedError: the format cannot hold a value.
    """
    with _named(next(iter(weights))):
        hessian = Hessian.of(moments.hessian)
    guess, parts = hessian.solve(moments.drift), [len(weight) for weight in weights.values()]
    guesses = torch.split(guess, parts) if moments.of_outputs else [guess] * len(parts)
    for (name, weight), moved in zip(weights.items(), guesses, strict=True):
        with _named(name):
            target = weight + (moved if moments.of_outputs else weight @ moved)
            scheme = scheme_of(name)
            if codes is None:
                grid = grid_of(scheme, target, hessian.diagonal())
                start = grid.tensor(gptq(target, hessian, grid))
            else:
                start = codes(weight, scheme)
            found = refit(start, target, hessian)
        yield name, found


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Say of an error which layer it is about."""
    try:
        yield
    except (CheckpointError, UnsupportedError) as error:
        raise type(error)(f"{name}: {error}") from error
