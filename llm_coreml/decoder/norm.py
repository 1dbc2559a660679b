"""Norms that stay finite in fp16 for any fp16 input.

`mean(x * x)` overflows fp16 at |x| > 255. Any positive scale m leaves the result unchanged,
    x / sqrt(mean(x^2) + eps) = (x/m) / sqrt(mean((x/m)^2) + eps / m^2),
so the row is brought to a range of its own first: the widest in which the sum of its squares is
still an fp16 number. Beside one massive activation the others must not become so small that
their last bits are lost, or all of them where a device flushes subnormal numbers. The floor on m
keeps eps / m^2 an fp16 number, and sqrt(eps) is a normal one where eps is not.

LayerNorm is the same of a row whose mean has been taken off. A sum of large numbers overflows, so
the mean is taken of the row over its largest; and a difference of two may be twice as large as
either, so each is halved first:
    (x - mean) / sqrt(var + eps) = (c / 2) / sqrt(mean((c / 2)^2) + eps / 4),   c = x - mean.

That is the form `scaled`: a device may round every step of it to fp16. Two shorter ones leave the
sum of squares to one operation, inside of which nothing is rounded so:
- `l2` takes the Euclidean norm of the row and of a few numbers behind it, whose squares add up to
  size * eps, all so small that the norm is an fp16 number for any row (after ExecuTorch's
  RMSNormCoreML, pull request 19523, whose eps is a floor);
- `layer` is the layer norm of `[x, -x]`, whose mean is zero (after ANEMLL).
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from llm_coreml.decoder.spec import NormSpec
from llm_coreml.targets import NormForm

_SMALLEST_SCALE = 2.0**-8
# Half of what fp16 holds, for the roundings on the way; and what eps allows for a short row.
_LARGEST_SUM = 2.0**15
_WIDEST = 8.0
# Numbers behind a row, so that a width that was a multiple of 32 stays one.
_BEHIND = 32
# Of a smaller number fp16 has next to no bits.
_LEAST = 2.0**-20


class RMSNorm(nn.Module):
    """Root-mean-square norm of the last axis (arXiv 1910.07467).

    Args:
        size: Width of the last axis.
        eps: Added to the mean square.
        gain: A learned gain follows.
        bias: And a learned bias.
        rows: What gain and bias have of their own: each of the last axis but one, of so many.

    Attributes:
        form: How it is computed.
    """

    # How much of a row is left when it is normed: all of it.
    _kept: ClassVar[float] = 1.0
    # Numbers of the form `scaled` that `l2` has no use for.
    _scaled_alone: ClassVar[tuple[str, ...]] = ("root_eps", "inverse_range", "smallest_scale")
    form: NormForm
    root_eps: torch.Tensor
    smallest_scale: torch.Tensor
    inverse_range: torch.Tensor
    shrink: torch.Tensor
    grow: torch.Tensor
    _behind: float
    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self, size: int, eps: float, gain: bool = True, bias: bool = False, rows: int | None = None
    ) -> None:
        super().__init__()
        self.size, self.eps, self.form = size, eps, "scaled"
        shape = (size,) if rows is None else (rows, size)
        held = {"weight": torch.ones(shape) if gain else None}
        held["bias"] = torch.zeros(shape) if bias else None
        for name, values in held.items():
            parameter = None if values is None else nn.Parameter(values, requires_grad=False)
            self.register_parameter(name, parameter)
        # Tensors, because coremltools turns `number / tensor` into an inverse with an epsilon
        # of its own, and a one-sided clamp into a clip with an infinite bound.
        root = math.sqrt(eps) * self._kept
        self.register_buffer("root_eps", torch.tensor([root]), persistent=False)
        self.register_buffer("smallest_scale", torch.tensor([_SMALLEST_SCALE]), persistent=False)
        # A power of two: it changes no bit but where it saves some.
        inverse = 2.0 ** -math.floor(math.log2(min(_WIDEST, math.sqrt(_LARGEST_SUM / size))))
        self.register_buffer("inverse_range", torch.tensor([inverse]), persistent=False)

    def take(self, form: NormForm, storage: torch.dtype) -> None:
        """Be computed in another form.

        Args:
            form: Which; an eps of which fp16 has next to no bits is `l2` where `layer` is asked
                for.
            storage: What a program holds its numbers in.
        """
        self.form = "l2" if form == "layer" and self.eps < _LEAST else form
        if self.form == "layer":
            self.eps = _held(self.eps, storage)
            self._forget(RMSNorm._scaled_alone)
        if self.form != "l2":
            return
        self._forget(self._scaled_alone)
        shrink = 2.0 ** -math.ceil(math.log2(math.sqrt(self.size)))
        root = math.sqrt(self.size / _BEHIND * self.eps) * self._kept * shrink
        self._behind = _held(max(root, _LEAST), storage)
        grow = torch.tensor([1 / (shrink * math.sqrt(self.size))])
        self.register_buffer("shrink", torch.tensor([shrink]), persistent=False)
        self.register_buffer("grow", grow, persistent=False)

    def _forget(self, names: tuple[str, ...]) -> None:
        # A program is held to have every number of its decoder.
        for name in names:
            self._buffers.pop(name, None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise the last axis of `x`; same shape and dtype."""
        if self.form == "layer":
            both = F.layer_norm(torch.cat((x, -x), dim=-1), (2 * self.size,), eps=self.eps)
            return self._scaled(both[..., : self.size])
        return self._scaled(self._normed(x))

    def _normed(self, x: torch.Tensor) -> torch.Tensor:
        if self.form == "l2":
            row = F.pad(x * self.shrink, (0, _BEHIND), value=self._behind)
            length: torch.Tensor = torch.linalg.vector_norm(row, dim=-1, keepdim=True)
            return x / (length * self.grow)
        largest = torch.maximum(x.abs().amax(dim=-1, keepdim=True), self.smallest_scale)
        scale = largest * self.inverse_range
        scaled = x / scale
        floor = self.root_eps / scale
        mean_square = (scaled * scaled).mean(dim=-1, keepdim=True)
        return scaled * torch.rsqrt(mean_square + floor * floor)

    def _scaled(self, normed: torch.Tensor) -> torch.Tensor:
        if self.weight is not None:
            normed = normed * self.weight
        return normed if self.bias is None else normed + self.bias


class LayerNorm(RMSNorm):
    """Norm of the last axis by mean and variance (arXiv 1607.06450); arguments as `RMSNorm`."""

    _kept = 0.5
    _scaled_alone = ("root_eps", "inverse_range")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise the last axis of `x`; same shape and dtype."""
        if self.form == "layer":
            return self._scaled(F.layer_norm(x, (self.size,), eps=self.eps))
        largest = torch.maximum(x.abs().amax(dim=-1, keepdim=True), self.smallest_scale)
        half_mean = (x / largest).mean(dim=-1, keepdim=True) * (largest * self._kept)
        return self._scaled(self._normed(x * self._kept - half_mean))


def norm_of(spec: NormSpec, size: int, rows: int | None = None) -> RMSNorm:
    """Return the norm of rows of `size` numbers; of `rows`, each has a gain and bias of its own."""
    kind = LayerNorm if spec.kind == "layer" else RMSNorm
    return kind(size, spec.eps, spec.gain, spec.bias, rows)


def take_form(module: nn.Module, form: NormForm, storage: torch.dtype) -> None:
    """Have every norm of a decoder computed in a form, see `RMSNorm.take`."""
    if form != "scaled":
        for norm in module.modules():
            if isinstance(norm, RMSNorm):
                norm.take(form, storage)


def _held(value: float, storage: torch.dtype) -> float:
    """Return the number that a program holds for `value`."""
    return float(torch.tensor(value, dtype=torch.float64).to(storage))
