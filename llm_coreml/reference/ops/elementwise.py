"""Elementwise arithmetic, comparison, logic, casts and choices.

Integers stay integers: `floor_div` rounds down, `mod` takes the divisor's sign, sums wrap. Where
Core ML leaves a result undefined (integer `real_div`, a cast out of range), the reference refuses.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from llm_coreml.artifact.dtypes import DTYPES
from llm_coreml.errors import ArtifactError
from llm_coreml.reference.ops.registry import Tensor, fixed, floats, named_by, op, same
from llm_coreml.reference.ops.storage import storage


def _unary(name: str, function: Callable[[Tensor], Tensor], *, exact: bool = False) -> None:
    def kernel(x: Tensor) -> Tensor:
        return function(x)

    op(name, floats("x"), exact=exact, fresh=True)(kernel)


def _integer_unary(name: str, function: Callable[[Tensor], Tensor], *, exact: bool = False) -> None:
    def kernel(x: Tensor) -> Tensor:
        return function(x).to(x.dtype)

    op(name, same("x"), exact=exact, fresh=True)(kernel)


def _binary(
    name: str,
    function: Callable[[Tensor, Tensor], Tensor],
    *,
    exact: bool = False,
    half: bool | None = None,
) -> None:
    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return function(x, y)

    op(name, same("x", "y"), exact=exact, fresh=True, half=half)(kernel)


def _comparison(name: str, function: Callable[[Tensor, Tensor], Tensor]) -> None:
    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return function(x, y)

    op(name, fixed("bool", "x", "y"), exact=True, fresh=True)(kernel)


for _name, _function in (
    ("acos", torch.acos),
    ("asin", torch.asin),
    ("atan", torch.atan),
    ("atanh", torch.atanh),
    ("cos", torch.cos),
    ("cosh", torch.cosh),
    ("erf", torch.erf),
    ("exp", torch.exp),
    ("sin", torch.sin),
    ("sinh", torch.sinh),
    ("sqrt", torch.sqrt),
    ("tan", torch.tan),
    ("tanh", torch.tanh),
):
    _unary(_name, _function)

for _name, _function in (("ceil", torch.ceil), ("floor", torch.floor), ("round", torch.round)):
    _unary(_name, _function, exact=True)

_integer_unary("abs", torch.abs, exact=True)
_integer_unary("sign", torch.sign, exact=True)
_integer_unary("exp2", torch.exp2)
_integer_unary("square", torch.square)

_Pair = Callable[[Tensor, Tensor], Tensor]

_SINGLE: tuple[tuple[str, _Pair], ...] = (
    ("add", torch.add),
    ("sub", torch.sub),
    ("mul", torch.mul),
)
for _name, _pair in _SINGLE:
    _binary(_name, _pair, half=True)

_ARITHMETIC: tuple[tuple[str, _Pair], ...] = (
    ("pow", torch.pow),
    ("floor_div", torch.floor_divide),
    ("mod", torch.remainder),
)
for _name, _pair in _ARITHMETIC:
    _binary(_name, _pair)

_binary("maximum", torch.maximum, exact=True)
_binary("minimum", torch.minimum, exact=True)

_COMPARISONS: tuple[tuple[str, _Pair], ...] = (
    ("equal", torch.eq),
    ("not_equal", torch.ne),
    ("greater", torch.gt),
    ("greater_equal", torch.ge),
    ("less", torch.lt),
    ("less_equal", torch.le),
    ("logical_and", torch.logical_and),
    ("logical_or", torch.logical_or),
    ("logical_xor", torch.logical_xor),
)
for _name, _pair in _COMPARISONS:
    _comparison(_name, _pair)


@op("logical_not", fixed("bool"), exact=True, fresh=True)
def logical_not(x: Tensor) -> Tensor:
    """Return the elementwise negation of a bool tensor."""
    return torch.logical_not(x)


@op("real_div", floats("x", "y"), fresh=True, half=True)
def real_div(x: Tensor, y: Tensor) -> Tensor:
    """Return x / y; integers are refused, because Core ML does not say how they round."""
    return x / y


def _default_epsilon(declared: str, value: float) -> float:
    # An omitted epsilon has the operand's type; 1e-12 and 1e-45 are zero in fp16.
    return float(np.float16(value)) if declared == "fp16" else float(np.float32(value))


@op("inverse", floats("x"), fresh=True)
def inverse(x: Tensor, declared: str, epsilon: float | None = None) -> Tensor:
    """Return 1 / (x + epsilon)."""
    return torch.reciprocal(x + (_default_epsilon(declared, 1e-4) if epsilon is None else epsilon))


@op("rsqrt", floats("x"), fresh=True)
def rsqrt(x: Tensor, declared: str, epsilon: float | None = None) -> Tensor:
    """Return 1 / sqrt(x + epsilon)."""
    return torch.rsqrt(x + (_default_epsilon(declared, 1e-12) if epsilon is None else epsilon))


@op("log", floats("x"), fresh=True)
def log(x: Tensor, declared: str, epsilon: float | None = None) -> Tensor:
    """Return the natural logarithm of x + epsilon."""
    return torch.log(x + (_default_epsilon(declared, 1e-45) if epsilon is None else epsilon))


@op("clip", floats("x"), fresh=True)
def clip(x: Tensor, alpha: float, beta: float) -> Tensor:
    """Return x limited to [alpha, beta]."""
    return torch.clamp(x, alpha, beta)


@op("threshold", same("x"), fresh=True)
def threshold(x: Tensor, alpha: float) -> Tensor:
    """Return x, or alpha where x is below it."""
    return torch.clamp(x, min=alpha)


@op("select", same("a", "b"), exact=True, fresh=True)
def select(cond: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return a where cond holds and b elsewhere."""
    return torch.where(cond, a, b)


@op("identity", same("x"), exact=True)
def identity(x: Tensor) -> Tensor:
    """Return x."""
    return x


@op("cast", named_by("dtype"), half=True)
def cast(x: Tensor, dtype: str) -> Tensor:
    """Return x as `dtype`; towards zero from float to integer.

    Raises:
        ArtifactError: a value does not fit an integer type.
    """
    target = storage(dtype)
    if target == torch.bool:
        return x != 0
    if DTYPES[dtype].is_float:
        return x.to(target)
    return to_integer(x, dtype)


def to_integer(x: Tensor, dtype: str) -> Tensor:
    """Return x as the integer type `dtype`, towards zero.

    Raises:
        ArtifactError: a value is not finite or does not fit; no rule says what comes out then.
    """
    row = DTYPES[dtype]
    target = storage(dtype)
    if x.dtype == target and row.array.itemsize == target.itemsize:
        return x
    if x.numel() and x.dtype != torch.bool:
        low, high = torch.aminmax(x)
        limit = np.iinfo(row.array.name)
        # The comparison is false for NaN, too.
        if not (low.item() > limit.min - 1 and high.item() < limit.max + 1):
            raise ArtifactError(
                f"a value between {low.item()} and {high.item()} does not fit {dtype}"
            )
    return x.to(target)
