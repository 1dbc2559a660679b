"""Feed-forward layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import nn

from llm_coreml.decoder.eight_bit import EightBit
from llm_coreml.decoder.matrices import Linear
from llm_coreml.decoder.norm import norm_of
from llm_coreml.decoder.spec import Activation, MLPSpec
from llm_coreml.decoder.wiring import Halt, Matrix, Steps, Wiring


def _relu2(x: torch.Tensor) -> torch.Tensor:
    return torch.relu(x) * torch.relu(x)


ACTIVATIONS: Mapping[Activation, Callable[[torch.Tensor], torch.Tensor]] = MappingProxyType(
    {
        "silu": F.silu,
        "gelu": F.gelu,
        "gelu_tanh": partial(F.gelu, approximate="tanh"),
        "relu": torch.relu,
        "relu2": _relu2,
    }
)


class QuickGELU(nn.Module):
    """GELU by a sigmoid: `x * sigmoid(1.702 x)` (arXiv 1606.08415)."""

    slope: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        # A tensor, which the eager decoder rounds as the program does.
        self.register_buffer("slope", torch.tensor([1.702]), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the activation of every number of `x`."""
        return x * torch.sigmoid(x * self.slope)


class XIELU(nn.Module):
    """Quadratic above zero, and an integral of ELU below it (arXiv 2411.13010).

    `alpha_p x^2 + x / 2` for x > 0, else `alpha_n (exp(x) - 1 - x) + x / 2`; both alphas `[1]` as
    they are multiplied with.
    """

    _SLOPE = 0.5

    def __init__(self) -> None:
        super().__init__()
        self.alpha_p = nn.Parameter(torch.ones(1), requires_grad=False)
        self.alpha_n = nn.Parameter(torch.ones(1), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the activation of every number of `x`."""
        above = torch.relu(x)
        below = x - above
        # exp(x) - 1 without a difference of what is nearly the same.
        rest = torch.tanh(below * 0.5) * (torch.exp(below) + 1) - below
        return above * (above * self.alpha_p) + rest * self.alpha_n + x * self._SLOPE


# Activations that hold numbers.
_WITH_NUMBERS: Mapping[Activation, type[nn.Module]] = MappingProxyType(
    {"quick_gelu": QuickGELU, "xielu": XIELU}
)


class MLP(nn.Module):
    """Feed-forward, gated or plain: `down(act(gate(x)) * up(x))` (arXiv 2002.05202).

    Args:
        spec: Sizes and options.
        hidden_size: Width of the residual stream.

    Attributes:
        activated: Rounds what the activation gives to 8 bits; None leaves it as it is.
    """

    activated: EightBit | None

    def __init__(self, spec: MLPSpec, hidden_size: int) -> None:
        super().__init__()
        self.spec = spec
        self.activated = None
        inner = spec.intermediate_size
        if spec.gated:
            self.gate_proj = Linear(hidden_size, inner, bias=spec.bias)
        self.up_proj = Linear(hidden_size, inner, bias=spec.bias)
        self.down_proj = Linear(inner, hidden_size, bias=spec.bias)
        if spec.activation in _WITH_NUMBERS:
            self.act_fn = _WITH_NUMBERS[spec.activation]()
        if spec.inner_norm is not None:
            self.inner_norm = norm_of(spec.inner_norm, inner)

    @property
    def wiring(self) -> Wiring:
        """What each matrix reads and writes."""
        names = ("gate_proj", "up_proj") if self.spec.gated else ("up_proj",)
        projections = tuple(Matrix(name, reads="residual") for name in names)
        inner = ("act_fn",) if self.spec.activation == "xielu" else ()
        last = () if self.spec.inner_norm is None else ("inner_norm",)
        return Wiring((projections, (Matrix("down_proj", writes="residual"),)), (*inner, *last))

    def steps(self, inputs: Halt) -> Steps:
        """Map `inputs` `[1, S, hidden]` to the same shape."""
        inner = yield partial(self._inner, (yield inputs))
        return self.down_proj(self.down_proj.arrange(inner))  # type: ignore[no-any-return]

    def _inner(self, x: torch.Tensor) -> torch.Tensor:
        """Return what the last matrix reads, `[1, S, intermediate]`."""
        inner = self._activated(x)
        return inner if self.spec.inner_norm is None else self.inner_norm(inner)

    def _activated(self, x: torch.Tensor) -> torch.Tensor:
        """Return `act(gate(x)) * up(x)`, or `act(up(x))` without a gate."""
        activation = ACTIVATIONS.get(self.spec.activation)
        if activation is None:
            activation = self.act_fn
        gated = self.spec.gated
        first = self.gate_proj if gated else self.up_proj
        x = first.arrange(x)  # which is that of `up_proj`, too
        gate = activation(first(x))
        gate = gate if self.activated is None else self.activated(gate)
        if not gated:
            return gate
        return gate * self.up_proj(x)  # type: ignore[no-any-return]
