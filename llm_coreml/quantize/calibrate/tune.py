"""Recovery tuning: let the logits of a quantized decoder come closer to the original's on a text.

    tune(decoder, teacher, windows, steps=200)

The codes stay as they are. Scales, float zero points, tables and norms follow the gradient of the
divergence KL(original || quantized), through all blocks at once (as block-wise methods cannot; cf.
EfficientQAT's second phase, arXiv:2407.11062). They are rounded to fp16 in the forward pass, so
that what is judged is what is stored; the gradient passes the rounding unchanged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from llm_coreml.decoder import Decoder
from llm_coreml.decoder.matrices import Linear
from llm_coreml.decoder.norm import RMSNorm
from llm_coreml.errors import CheckpointError, UnsupportedError
from llm_coreml.quantize.formats.adjustable import Adjustable, Values, adjustable
from llm_coreml.quantize.formats.round import dense_rows
from llm_coreml.quantize.formats.serialize import moved

# Adam's step in shares of the mean size of what it changes. Of 1, 3 and 10 thousandths the last
# takes integers of 4 bits away from the original, on other text than that read.
_RATE = 3e-3
# Of the factors of products beside weights, which begin as what rounding took.
_FACTOR_RATE = 1e-2
_BETAS = (0.9, 0.99)
_WARMUP = 10


class _Round(torch.autograd.Function):
    """Rounding to fp16, whose gradient is that of doing nothing (a straight-through estimator)."""

    @staticmethod
    def forward(context: Any, values: torch.Tensor) -> torch.Tensor:
        return values.to(torch.float16).to(torch.float32)

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> torch.Tensor:
        return gradients[0]


def _rounded(values: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = _Round.apply(values)  # type: ignore[no-untyped-call]
    return found


@dataclass(frozen=True)
class Tuning:
    """What tuning did.

    Attributes:
        steps: Windows read, one for each step.
        before: Mean KL(original || quantized) over all windows, nats per token.
        after: The same with what is stored now.
    """

    steps: int
    before: float
    after: float


class _Student:
    """A decoder whose weights are functions of the values that may change.

    Args:
        decoder: Stays where it is, on the CPU.
        device: Where all of it is computed but the look-up in the token table.
        recover: Products beside weights may change, too.
    """

    def __init__(self, decoder: Decoder, device: torch.device, recover: bool = False) -> None:
        self._decoder = decoder
        self._device = device
        self._linear: dict[str, Adjustable] = {}
        self.values: dict[str, Values] = {}
        for name, module in decoder.named_modules():
            if name.startswith("per_layer."):
                continue  # as the token table, it stays what it is
            key = f"{name}.weight"
            if isinstance(module, Linear) and module is not decoder.lm_head:
                self._linear[key] = adjustable(moved(module.weight.detach(), device))
                self.values[key] = tuple(value.clone() for value in self._linear[key].values)
                for kind, factor in (("down", module.down), ("up", module.up)):
                    if recover and factor is not None:
                        self.values[f"{name}.{kind}"] = (factor.detach().float().to(device),)
            elif isinstance(module, RMSNorm) and module.weight is not None and name != "embed_norm":
                self.values[key] = (module.weight.detach().to(device, copy=True),)
        head = decoder.lm_head.weight.detach()
        self._head = torch.cat([rows.to(device) for rows in dense_rows(head)])
        owners = [f"layers.{index}" for index in range(len(decoder.layers))]
        self._buffers = {
            owner: {n: b.to(device) for n, b in _untouched(decoder.get_submodule(owner))}
            for owner in (*owners, "norm")
        }

    def logits(self, window: Sequence[int]) -> torch.Tensor:
        """Return what the decoder makes of a text, fp32 `[tokens, vocab]`."""
        decoder, weights = self._decoder, self._weights()
        tokens = torch.tensor([list(window)])
        chunk = decoder.window(len(window)).to(self._device)
        x = decoder.embed(tokens).to(self._device)
        for index, block in enumerate(decoder.layers):
            x = functional_call(block, weights[f"layers.{index}"], (x, chunk))
        x = functional_call(decoder.norm, weights["norm"], (x,))
        return decoder.leaving(x.squeeze(0) @ self._head.T)

    def _weights(self) -> dict[str, dict[str, torch.Tensor]]:
        """Return the tensors of each block, and of the last norm, by their names in it."""
        found = {owner: buffers.copy() for owner, buffers in self._buffers.items()}
        for name, values in self.values.items():
            stored = tuple(_rounded(value) for value in values)
            weight = self._linear[name].dense(stored) if name in self._linear else stored[0]
            parts = name.split(".")
            length = 2 if parts[0] == "layers" else 1
            found[".".join(parts[:length])][".".join(parts[length:])] = weight
        return found

    def weights(self) -> dict[str, torch.Tensor]:
        """Return what the decoder holds, as it holds it."""
        return {name: self._decoder.get_parameter(name) for name in self.values}

    def put(self, weights: dict[str, torch.Tensor]) -> None:
        """Give the decoder parameters by their names."""
        for name, weight in weights.items():
            owner, _, kind = name.rpartition(".")
            weight = moved(weight.detach(), torch.device("cpu"))
            parameter = nn.Parameter(weight, requires_grad=False)
            setattr(self._decoder.get_submodule(owner), kind, parameter)

    def store(self) -> None:
        """Give the decoder the values as they are now. Raises UnsupportedError beyond fp16."""
        made = {}
        for name, values in self.values.items():
            changed = tuple(value.detach() for value in values)
            if name in self._linear:
                made[name] = self._linear[name].rebuilt(changed)
            else:
                dtype = self._decoder.get_parameter(name).dtype
                made[name] = changed[0].to(torch.float16).to(dtype)
        self.put(made)


def _untouched(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield what a module computes with beside weights: its buffers, biases and single numbers."""
    yield from module.named_buffers()
    for name, parameter in module.named_parameters():
        if not name.endswith("weight"):
            yield name, parameter.detach()


def tune(
    decoder: Decoder,
    teacher: Decoder,
    windows: Sequence[Sequence[int]],
    steps: int,
    on_progress: Callable[[float], None] = lambda _: None,
    recover: bool = False,
) -> Tuning:
    """Change scales, zero points, tables and norms of `decoder` for the better, if there is any.

    Args:
        decoder: Quantized; its token table and head stay as they are. It is held in fp32 as a
            whole, with gradients: about 16 bytes per weight, on a GPU that torch knows as `cuda`
            if there is one.
        teacher: The original, which is moved there while it is needed.
        windows: Tokens of a text; each fits both caches.
        steps: Windows to learn from, which are read again and again in a fixed random order.
        on_progress: Called with the share done, 0 to 1.
        recover: Change products beside weights, too, where there are any.

    Raises:
        CheckpointError: the divergence is not finite.
        UnsupportedError: a linear layer is not quantized, or a GPU has too little memory.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    home = teacher.positions.device
    try:
        student = _Student(decoder, device, recover)
        teacher.to(device)
        return _tuned(student, decoder, teacher, windows, steps, on_progress)
    except torch.OutOfMemoryError as error:
        raise UnsupportedError(
            "Tuning does not fit the GPU's memory; set CUDA_VISIBLE_DEVICES to nothing to tune on "
            "the CPU, or export without --tune."
        ) from error
    finally:
        teacher.to(home)


def _tuned(
    student: _Student,
    decoder: Decoder,
    teacher: Decoder,
    windows: Sequence[Sequence[int]],
    steps: int,
    on_progress: Callable[[float], None],
) -> Tuning:
    before = _divergence(student, teacher, windows)
    if not math.isfinite(before):
        raise CheckpointError(
            "The divergence on the calibration text is not finite, so there is nothing to tune by; "
            "the checkpoint overflows, or is damaged. Export without --tune."
        )
    weights = student.weights()
    student.values = {
        name: tuple(value.clone().requires_grad_() for value in values)
        for name, values in student.values.items()
    }
    optimizer = torch.optim.Adam(
        [
            {"params": [value], "lr": rate * (float(value.detach().abs().mean()) or 1.0)}
            for name, values in student.values.items()
            for rate in [_RATE if name.endswith(".weight") else _FACTOR_RATE]
            for value in values
        ],
        betas=_BETAS,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    for step, window in enumerate(_order(windows, steps)):
        torch.autograd.backward(_loss(student, teacher, window).mean())
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        on_progress((step + 1) / steps)
    after = _stored_divergence(student, decoder, teacher, windows)
    if not after < before:  # not a number either
        student.put(weights)
        after = before
    return Tuning(steps, before, after)


def _stored_divergence(
    student: _Student, decoder: Decoder, teacher: Decoder, windows: Sequence[Sequence[int]]
) -> float:
    """Store what was found, and return how far that is; a float zero point is rounded once more."""
    try:
        student.store()
    except UnsupportedError:
        return math.inf  # fp16 cannot hold it
    return _divergence(_Student(decoder, teacher.positions.device), teacher, windows)


def _rate(step: int, steps: int) -> float:
    """Return the share of the rate: up in a few steps, then down along a cosine."""
    return min(1.0, (step + 1) / _WARMUP) * (1 + math.cos(math.pi * step / steps)) / 2


def _order(windows: Sequence[Sequence[int]], steps: int) -> Iterator[Sequence[int]]:
    generator = torch.Generator().manual_seed(0)
    left: list[int] = []
    for _ in range(steps):
        left = left or torch.randperm(len(windows), generator=generator).tolist()
        yield windows[left.pop()]


def _loss(student: _Student, teacher: Decoder, window: Sequence[int]) -> torch.Tensor:
    """Return KL(teacher || student) of each token of a window, nats."""
    with torch.no_grad():
        place = teacher.positions.device
        tokens, start_pos = torch.tensor([list(window)]), torch.zeros(1, dtype=torch.int64)
        hidden = teacher.hidden(tokens.to(place), start_pos.to(place))
        wanted = torch.log_softmax(teacher.head(hidden)[0], dim=-1)
    found = torch.log_softmax(student.logits(window), dim=-1)
    return (wanted.exp() * (wanted - found)).sum(-1)


@torch.no_grad()
def _divergence(student: _Student, teacher: Decoder, windows: Sequence[Sequence[int]]) -> float:
    return float(torch.cat([_loss(student, teacher, window) for window in windows]).mean())
