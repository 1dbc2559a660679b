"""Torch functions and modules of the kinds that ExecuTorch's Core ML tests lower.

A sample is a group of functions of the same inputs, which become the outputs of one program: an
export costs a second whatever is in it, and each output is still compared under its own name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import llm_coreml.lower.coreml_ops  # noqa: F401 - registers GELU as it is asked for

Tensor = torch.Tensor


@dataclass(frozen=True, eq=False)
class Part:
    """A function or module that coremltools lowers to a chain of operations, or changes.

    Attributes:
        function: what is lowered.
        roundings: operations in the longest chain, each of which a fp16 program rounds.
        meaning: what coremltools makes of the function, where that is something else.
    """

    function: Callable[..., Tensor]
    roundings: int = 1
    meaning: Callable[..., Tensor] | None = None


@dataclass(frozen=True, eq=False)
class Sample:
    """What to lower, and with which inputs.

    Attributes:
        given: output's name to a part, or to a function or module that becomes one operation.
        inputs: what every part is called with.
    """

    given: dict[str, Part | Callable[..., Tensor]]
    inputs: tuple[Tensor, ...]

    @property
    def parts(self) -> dict[str, Part]:
        """The parts by name."""
        return {
            name: part if isinstance(part, Part) else Part(part)
            for name, part in self.given.items()
        }

    def module(self) -> nn.Module:
        """Return the module that gives the results of all parts, in order."""
        return _Together([part.function for part in self.parts.values()])


class _Together(nn.Module):
    def __init__(self, functions: list[Callable[..., Tensor]]) -> None:
        super().__init__()
        self.functions = functions
        self.held = nn.ModuleList(item for item in functions if isinstance(item, nn.Module))

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(function(*inputs) for function in self.functions)


def uniform(*shape: int, low: float = -1.0, high: float = 1.0, seed: int = 0) -> Tensor:
    """Return values that fp16 holds, so that giving them to a fp16 program loses nothing."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(shape, generator=generator) * (high - low) + low
    return drawn.half().float()


def made(kind: Callable[..., nn.Module], *args: Any, **options: Any) -> nn.Module:
    """Return a module with random parameters and running statistics, all of which fp16 holds."""
    torch.manual_seed(0)
    module = kind(*args, **options).eval()
    with torch.no_grad():
        for seed, tensor in enumerate([*module.parameters(), *module.buffers()]):
            if tensor.is_floating_point():
                fan = max(1, tensor[0].numel() if tensor.dim() > 1 else 1)
                positive = tensor.dim() == 1 and bool((tensor > 0).all())
                low, high = (0.5, 1.5) if positive else (-(fan**-0.5), fan**-0.5)
                # Ones are scales and variances, and stay positive.
                tensor.copy_(uniform(*tensor.shape, low=low, high=high, seed=seed))
    return module


X = uniform(2, 3, 8)
IMAGE = uniform(1, 4, 8, 8)
POSITIVE = uniform(2, 3, 8, low=0.25, high=2.0)
CONV1D = made(nn.Conv1d, 4, 6, 3, padding=2)
CONV3D = made(nn.Conv3d, 1, 2, 2)
UNCONV1D = made(nn.ConvTranspose1d, 4, 6, 3, stride=2)
TOKENS = torch.tensor([[3, 0, 7], [7, 1, 2]])
RMS = made(nn.RMSNorm, 8, eps=1e-5)
GROUP = made(nn.GroupNorm, 2, 4)


def peak(x: Tensor) -> Tensor:
    return x.abs().amax(-1, keepdim=True)


SAMPLES: dict[str, Sample] = {
    "arithmetic": Sample(
        {
            "add": lambda x, y: x + y,
            "add alpha": lambda x, y: torch.add(x, y, alpha=0.5),
            "sub": lambda x, y: x - y,
            "rsub": lambda x, y: 1 - x,
            "mul": lambda x, y: x * y,
            "div": lambda x, y: x / y,
            "div floor": lambda x, y: torch.div(x, y, rounding_mode="floor"),
            "div trunc": lambda x, y: torch.div(x, y, rounding_mode="trunc"),
            "floor divide": lambda x, y: torch.floor_divide(x, y * 2),
            "remainder": lambda x, y: torch.remainder(x, y),
            "maximum": torch.maximum,
            "minimum": torch.minimum,
            "pow": lambda x, y: y**2.5,
            "square": lambda x, y: torch.square(x),
            "neg": lambda x, y: -x,
            "addcmul": lambda x, y: torch.addcmul(x, x, y, value=0.5),
            "broadcast": lambda x, y: x + y[:, :1, :1],
        },
        (X, POSITIVE),
    ),
    "rounding": Sample(
        {
            "abs": torch.abs,
            "ceil": torch.ceil,
            "floor": torch.floor,
            "round": torch.round,
            "sign": torch.sign,
            "clamp": lambda x: torch.clamp(x, -2, 1.5),
            "clamp min": lambda x: torch.clamp(x, min=0.5),
        },
        (uniform(2, 3, 8, low=-4, high=4),),
    ),
    "functions": Sample(
        {
            "exp": torch.exp,
            "expm1": torch.expm1,
            "log": torch.log,
            "log1p": torch.log1p,
            "log2": torch.log2,
            "log10": Part(torch.log10, 2),
            "sqrt": torch.sqrt,
            "rsqrt": torch.rsqrt,
            # coremltools divides by x + 0.0001.
            "reciprocal": Part(torch.reciprocal, meaning=lambda x: 1 / (x + 1e-4)),
            "sin": torch.sin,
            "cos": torch.cos,
            "tanh": torch.tanh,
            "atan": torch.atan,
            "erf": torch.erf,
        },
        (POSITIVE,),
    ),
    "activations": Sample(
        {
            "relu": F.relu,
            "relu6": F.relu6,
            "gelu": F.gelu,
            "gelu tanh": lambda x: F.gelu(-x, approximate="tanh"),
            "silu": F.silu,
            "mish": Part(F.mish, 3),
            "elu": F.elu,
            "celu": lambda x: F.celu(x, 0.7),
            "selu": F.selu,
            "leaky relu": lambda x: F.leaky_relu(x, 0.2),
            "sigmoid": torch.sigmoid,
            "log sigmoid": F.logsigmoid,
            "hard sigmoid": F.hardsigmoid,
            "hard swish": F.hardswish,
            "hard tanh": lambda x: F.hardtanh(x, -0.7, 0.9),
            "softplus": F.softplus,
            "softsign": Part(F.softsign, 3),
            "tanhshrink": Part(F.tanhshrink, 2),
            "threshold": lambda x: F.threshold(x, 0.3, -1.5),
            "glu": Part(lambda x: F.glu(x, 2), 2),
            "softmax": lambda x: F.softmax(x, 1),
            "log softmax": lambda x: F.log_softmax(x, -1),
        },
        (uniform(2, 3, 8, low=-3, high=3),),
    ),
    "comparisons": Sample(
        {
            "gt": lambda x, y: x > y,
            "le": lambda x, y: x <= y,
            "eq": lambda x, y: x == x.round(),
            "ne": lambda x, y: x != 0,
            "and": lambda x, y: (x > 0) & (y > 1),
            "or": lambda x, y: (x > 0) | (y > 1),
            "not": lambda x, y: ~(x > 0),
            "where": lambda x, y: torch.where(x > 0, x, y),
            "masked fill": lambda x, y: x.masked_fill(y > 1, -3.0),
            "any": lambda x, y: (x > 0.8).any(-1),
            "all": lambda x, y: (x > -0.8).all(-1),
        },
        (X, POSITIVE),
    ),
    "reductions": Sample(
        {
            "sum": lambda x: x.sum(),
            "sum of axis": lambda x: x.sum(1),
            "mean": lambda x: x.mean((0, 2), keepdim=True),
            "amax": lambda x: x.amax((1, 2)),
            "amin": lambda x: x.amin(0),
            "max": lambda x: x.max(2).values,
            "max place": lambda x: x.max(2).indices,
            "argmax": lambda x: x.argmax(1),
            "argmin": lambda x: x.argmin(2, keepdim=True),
            "var": lambda x: x.var(2, correction=0),
            "std": lambda x: x.std(2),
            "norm": lambda x: torch.linalg.vector_norm(x, dim=1),
            "logsumexp": lambda x: x.logsumexp(2),
            "cumsum": lambda x: x.cumsum(1),
            "topk": lambda x: x.topk(3).values,
            "topk places": lambda x: x.topk(3).indices,
            "sort": lambda x: x.sort(-1).values,
            "sort places": lambda x: x.argsort(-1, descending=True),
        },
        (X,),
    ),
    "shapes": Sample(
        {
            "permute": lambda x: x.permute(2, 0, 1),
            "reshape": lambda x: x.reshape(-1, 4),
            "flatten": lambda x: x.flatten(1),
            "unsqueeze": lambda x: x.unsqueeze(-2),
            "squeeze": lambda x: x[:, :1].squeeze(1),
            "expand": lambda x: x[:, :1].expand(-1, 5, -1),
            "repeat": lambda x: x.repeat(1, 2, 3),
            "repeat interleave": lambda x: x.repeat_interleave(2, 1),
            "cat": lambda x: torch.cat([x, x[:, :2], x * 2], 1),
            "stack": lambda x: torch.stack([x, -x], 1),
            "flip": lambda x: x.flip(0, 2),
            "roll": lambda x: x.roll(3, 2),
            "split": lambda x: x.split([2, 6], 2)[1],
            "chunk": lambda x: x.chunk(4, -1)[2],
            "unbind": lambda x: x.unbind(1)[2],
            "pad": lambda x: F.pad(x, (1, 2), value=0.5),
            "reflect": lambda x: F.pad(x, (2, 1), mode="reflect"),
            "replicate": lambda x: F.pad(x, (2, 1), mode="replicate"),
            "tril": torch.tril,
            "triu": lambda x: torch.triu(x, 1),
            "clone": torch.clone,
        },
        (X,),
    ),
    "slices": Sample(
        {
            "slice": lambda x: x[:, 1:, 2:7],
            "strided": lambda x: x[..., 1::3],
            "negative": lambda x: x[:, -2:, :-3],
            "select": lambda x: x.select(1, -1),
            "narrow": lambda x: x.narrow(2, 3, 4),
            "slice scatter": lambda x: torch.slice_scatter(x, x[:, :, :4] * 2, 2, 1, 8, 2),
            "select scatter": lambda x: torch.select_scatter(x, x[:, 0], 1, 2),
            "new zeros": lambda x: x.new_zeros(2, 2) + x[0, :2, :2],
            "full": lambda x: torch.full((2, 8), 0.25) * x[:, 0],
            "full like": lambda x: torch.full_like(x, 3.0) - x,
            "arange": lambda x: torch.arange(8) + x,
        },
        (X,),
    ),
    "indices": Sample(
        {
            "embedding": made(nn.Embedding, 8, 4),
            "index select": lambda t, x=X: x.index_select(2, t[0]),
            "index": lambda t, x=X: x[:, :, t[1]],
            "index of two": lambda t, x=X: x[t[0] % 2, t[1] % 3],
            "gather": lambda t, x=X: x[:, 0].gather(1, t),
            "one hot": lambda t: F.one_hot(t, 8).float(),
            "index put": lambda t, x=X: x[0].T.index_put((t[0],), x[0].T[:3] * 2),
            "index put adds": lambda t, x=X: x[0].T.index_put((t[0],), x[0].T[:3], accumulate=True),
            "scatter": lambda t, x=X: x[:, 0].scatter(1, t, 9.0),
            "scatter add": lambda t, x=X: x[:, 0].scatter_add(1, t, x[:, 1, :3]),
        },
        (TOKENS,),
    ),
    "integers": Sample(
        {
            "add": lambda t: t + 3,
            "mul": lambda t: t * t,
            "remainder": lambda t: t % 3,
            "cast": lambda t: t.float() / 2,
            "sum": lambda t: t.sum(-1),
            "cumsum": lambda t: t.cumsum(1),
            "compare": lambda t: (t > 2).int(),
            "max": lambda t: t.amax(1),
        },
        (TOKENS.int(),),
    ),
    "products": Sample(
        {
            "linear": made(nn.Linear, 8, 5),
            "linear without bias": made(nn.Linear, 8, 5, bias=False),
            "matmul": lambda x: x @ x[0].T,
            "bmm": lambda x: torch.bmm(x, x.mT),
            "addmm": lambda x: torch.addmm(x[0, 0, :3], x[0], x[1].T, beta=0.5, alpha=2.0),
            "baddbmm": lambda x: torch.baddbmm(x[:, :, :3], x, x.mT),
            "einsum": lambda x: torch.einsum("bsd,btd->bst", x, -x),
            "outer": lambda x: torch.outer(x[0, 0], x[1, 1]),
        },
        (X,),
    ),
    "convolutions": Sample(
        {
            "plain": made(nn.Conv2d, 4, 6, 3),
            "padded": made(nn.Conv2d, 4, 6, 3, padding=1, bias=False),
            "strided": made(nn.Conv2d, 4, 6, (3, 2), stride=(2, 1), padding=(1, 0)),
            "dilated": made(nn.Conv2d, 4, 6, 3, dilation=2),
            "grouped": made(nn.Conv2d, 4, 8, 3, groups=2),
            "depthwise": made(nn.Conv2d, 4, 4, 3, groups=4, padding="same"),
            "pointwise": made(nn.Conv2d, 4, 6, 1),
            "of one axis": lambda x: CONV1D(x[:, :, 0]),
            "of three axes": lambda x: CONV3D(x[:, None]),
        },
        (IMAGE,),
    ),
    "transposed convolutions": Sample(
        {
            "plain": made(nn.ConvTranspose2d, 4, 6, 3),
            "strided": made(nn.ConvTranspose2d, 4, 6, 3, stride=2, padding=1, output_padding=1),
            "grouped": made(nn.ConvTranspose2d, 4, 6, 2, stride=2, groups=2),
            "of one axis": lambda x: UNCONV1D(x[:, :, 0]),
        },
        (IMAGE,),
    ),
    "pools": Sample(
        {
            "max": lambda x: F.max_pool2d(x, 2, 2),
            "max padded": lambda x: F.max_pool2d(x, 3, 2, 1),
            "max ceil": lambda x: F.max_pool2d(x, 3, 2, ceil_mode=True),
            "mean": lambda x: F.avg_pool2d(x, 2),
            "mean padded": lambda x: F.avg_pool2d(x, 3, 2, 1),
            "mean of what is there": lambda x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False),
            "adaptive": lambda x: F.adaptive_avg_pool2d(x, (2, 4)),
            "global": lambda x: F.adaptive_avg_pool2d(x, 1),
            "max of one axis": lambda x: F.max_pool1d(x[:, :, 0], 2, 2),
            "mean of one axis": lambda x: F.avg_pool1d(x[:, :, 0], 3, 2),
        },
        (IMAGE,),
    ),
    "pixels": Sample(
        {
            "pixel shuffle": lambda x: F.pixel_shuffle(x, 2),
            "pixel unshuffle": lambda x: F.pixel_unshuffle(x, 2),
        },
        (IMAGE,),
    ),
    "norms": Sample(
        {
            "layer": made(nn.LayerNorm, 8),
            "layer of two": lambda x: F.layer_norm(x, (8, 8)),
            # coremltools divides by the largest value first, and adds epsilon after that.
            "rms": Part(
                RMS,
                7,
                lambda x: RMS.weight * x / (x.square().mean(-1, True) + 1e-5 * peak(x) ** 2).sqrt(),
            ),
            "batch": made(nn.BatchNorm2d, 4),
            "prelu": made(nn.PReLU, 4),
            # Scale and shift become a batch norm of variance one, which adds epsilon again.
            "group": Part(
                GROUP,
                7,
                lambda x: torch.addcmul(
                    GROUP.bias[:, None, None],
                    F.group_norm(x, 2),
                    GROUP.weight[:, None, None],
                    value=(1 + 1e-5) ** -0.5,
                ),
            ),
            "instance": lambda x: F.instance_norm(x),
            "unit": Part(lambda x: F.normalize(x, dim=-1), 3),
            # The norm goes into the convolution's weights, which are then rounded.
            "conv and batch": Part(
                nn.Sequential(made(nn.Conv2d, 4, 6, 3), made(nn.BatchNorm2d, 6), nn.ReLU()), 3
            ),
        },
        (IMAGE,),
    ),
}  # fmt: skip
