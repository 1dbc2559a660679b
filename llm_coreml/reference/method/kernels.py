"""ExecuTorch's kernels that occur between Core ML delegates, each by torch's operator of that name.

A kernel such as `aten::add.out` takes the arguments of the schema that torch knows under the same
name, so the schema says which of the plan's values are arguments and which are results. Only what
is listed here runs: operators that move data, compare, or compute elementwise, and the few
reductions and products that an exporter keeps out of Core ML for their precision.

    step = kernel("aten::add.out", (3, 4, 5, 6, 6), method, memory)
    step(values)
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch

from llm_coreml.artifact.limits import FAILURES
from llm_coreml.artifact.method_plan import SCALAR_TYPES, Method, TensorSpec, ValueList
from llm_coreml.errors import ArtifactError, nearest
from llm_coreml.reference.method.memory import MethodMemory, Values, check_tensor, dtype_of

Step = Callable[[Values], None]


def _names(listed: str) -> frozenset[str]:
    return frozenset(f"aten::{name}" for name in listed.split())


# Kernels that copy their first argument, in the element type of the plan's result.
COPIES = frozenset(
    {
        "aten::_to_copy.out",
        "aten::alias_copy.out",
        "aten::clone.out",
        "aten::detach_copy.out",
        "aten::lift_fresh_copy.out",
        "dim_order_ops::_clone_dim_order.out",
        "dim_order_ops::_to_dim_order_copy.out",
    }
)

OPERATORS = _names(
    """
    arange.out arange.start_out cat.out constant_pad_nd.out embedding.out expand_copy.out
    fill.Scalar_out flip.out full.out full_like.out gather.out index.Tensor_out index_put.out
    index_select.out masked_fill.Scalar_out ones.out permute_copy.out repeat.out roll.out
    scalar_tensor.out scatter.src_out select_copy.int_out select_scatter.out
    slice_copy.Tensor_out slice_scatter.out split_copy.Tensor_out split_with_sizes_copy.out
    squeeze_copy.dim_out squeeze_copy.dims_out stack.out t_copy.out transpose_copy.int_out
    tril.out triu.out unbind_copy.int_out unsqueeze_copy.out view_copy.out where.self_out
    zeros.out

    abs.out add.Scalar_out add.out bitwise_and.Scalar_out bitwise_and.Tensor_out bitwise_not.out
    bitwise_or.Tensor_out clamp.out cos.out div.Scalar_out div.out eq.Scalar_out eq.Tensor_out
    exp.out floor.out floor_divide.out ge.Scalar_out ge.Tensor_out gelu.out gt.Scalar_out
    gt.Tensor_out le.Scalar_out le.Tensor_out log.out logical_and.out logical_not.out
    logical_or.out lt.Scalar_out lt.Tensor_out maximum.out minimum.out mul.Scalar_out mul.out
    ne.Scalar_out ne.Tensor_out neg.out pow.Tensor_Scalar_out pow.Tensor_Tensor_out
    reciprocal.out relu.out remainder.Scalar_out remainder.Tensor_out round.out rsqrt.out
    rsub.Scalar_out sigmoid.out sin.out sqrt.out sub.Scalar_out sub.out tanh.out

    _softmax.out addmm.out amax.out amin.out any.out argmax.out argmin.out bmm.out cumsum.out
    max.dim_max mean.out mm.out sum.IntList_out topk.values

    fmod.Tensor_out masked_fill.Tensor_out prod.int_out squeeze_copy.out trunc.out unfold_copy.out
    """
)

# Kernels that change their first argument.
IN_PLACE = _names("copy_ index_put_")


def _first_item(value: torch.Tensor) -> Any:
    return value.reshape(-1)[0].item()


def _quotient(a: int, b: int) -> int:
    """C++'s division of ints, which rounds towards zero."""
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def _rest(a: int, b: int) -> int:
    """C++'s remainder, which has the sign of `a`."""
    return a - b * _quotient(a, b)


# Kernels that give a number instead of a tensor; the last value is the result.
NUMBERS: dict[str, Callable[..., Any]] = {
    "aten::_local_scalar_dense": _first_item,
    "aten::sym_numel": torch.Tensor.numel,
    "aten::sym_size.int": torch.Tensor.size,
    "executorch_prim::add.Scalar": operator.add,
    "executorch_prim::ceil.Scalar": math.ceil,
    "executorch_prim::eq.Scalar": operator.eq,
    "executorch_prim::floordiv.Scalar": operator.floordiv,
    "executorch_prim::floordiv.int": _quotient,
    "executorch_prim::ge.Scalar": operator.ge,
    "executorch_prim::gt.Scalar": operator.gt,
    "executorch_prim::le.Scalar": operator.le,
    "executorch_prim::lt.Scalar": operator.lt,
    "executorch_prim::mod.Scalar": _rest,
    "executorch_prim::mod.int": _rest,
    "executorch_prim::mul.Scalar": operator.mul,
    "executorch_prim::neg.Scalar": operator.neg,
    "executorch_prim::sub.Scalar": operator.sub,
    "executorch_prim::sym_float.Scalar": float,
    "executorch_prim::sym_int.Scalar": int,
    "executorch_prim::sym_max.Scalar": max,
    "executorch_prim::sym_min.Scalar": min,
    "executorch_prim::sym_not.Scalar": operator.not_,
    "executorch_prim::truediv.Scalar": operator.truediv,
    "executorch_prim::trunc.Scalar": math.trunc,
}
_VIEW = "executorch_prim::et_view.default"

KERNELS = COPIES | OPERATORS | IN_PLACE | NUMBERS.keys() | {_VIEW}


def kernel(name: str, args: tuple[int, ...], method: Method, memory: MethodMemory) -> Step:
    """Return the step that runs the kernel `name` on the values `args`.

    Args:
        name: as the plan names it.
        args: numbers of the plan's values: arguments, then results.
        method: what the values are.
        memory: where results go.

    Raises:
        ArtifactError: the kernel is unknown, or is not called as its schema says. The step raises
            it where the kernel fails or gives what the plan does not expect.
    """
    who = f"Kernel '{name}' of method '{method.name}'"
    if name in COPIES:
        run = _copy(args, method, memory, name)
    elif name == _VIEW:
        run = _view(args, method)
    elif name in NUMBERS:
        run = _number(NUMBERS[name], args)
    elif name in OPERATORS or name in IN_PLACE:
        run = _Operator(name, args, method, memory).run
    else:
        raise ArtifactError(
            f"Method '{method.name}' runs '{name}' outside of Core ML, which the reference does "
            f"not know.{nearest(name, KERNELS)} Add it in llm_coreml/reference/method/kernels.py, "
            "or let Core ML run it."
        )

    def step(values: Values) -> None:
        try:
            run(values)
        except ArtifactError as error:
            raise ArtifactError(f"{who}: {error}") from error
        except FAILURES as error:
            reason = str(error).partition("\n")[0] or type(error).__name__
            raise ArtifactError(f"{who} fails: {reason}") from error

    return step


def present(values: Values, number: int) -> torch.Tensor:
    """Return the tensor that value `number` is now.

    Raises:
        ArtifactError: it is no tensor, or nothing has given it yet.
    """
    value = values[number]
    if not isinstance(value, torch.Tensor):
        what = "before it exists" if value is None else f"as a tensor, which is {value!r}"
        raise ArtifactError(f"value {number} is used {what}.")
    return value


def convert(value: torch.Tensor, target: torch.dtype) -> torch.Tensor:
    """Return `value` in the element type `target`; floats lose their fractions in an integer.

    Raises:
        ArtifactError: an integer type cannot hold a value, so that C++ does not define the result.
    """
    if value.dtype == target:
        return value
    whole = not target.is_floating_point and torch.bool not in (target, value.dtype)
    if whole and value.numel():
        limit = torch.iinfo(target)
        low, high = (bound.item() for bound in torch.aminmax(value))
        # Not a number compares as neither.
        if not (low > limit.min - 1 and high < limit.max + 1):
            raise ArtifactError(f"values {low} to {high} occur, which {target} cannot hold.")
    return value.to(target)


def _expect(args: tuple[int, ...], count: int, name: str) -> None:
    if len(args) != count:
        raise ArtifactError(f"Kernel '{name}' is called with {len(args)} values, not {count}.")


def _copy(args: tuple[int, ...], method: Method, memory: MethodMemory, name: str) -> Step:
    if len(args) < 2:
        raise ArtifactError(f"Kernel '{name}' is called with {len(args)} values.")
    result = method.values[args[-1]]
    if not isinstance(result, TensorSpec):
        raise ArtifactError(f"Kernel '{name}' is to give {result!r}, not a tensor.")

    def run(values: Values) -> None:
        memory.store(
            values, args[-1], convert(present(values, args[0]), dtype_of(result)), "its result"
        )

    return run


def _view(args: tuple[int, ...], method: Method) -> Step:
    _expect(args, 3, _VIEW)
    source, size, result = args
    spec = method.values[result]
    if not isinstance(spec, TensorSpec):
        raise ArtifactError(f"Kernel '{_VIEW}' is to give {spec!r}, not a tensor.")

    def run(values: Values) -> None:
        # The result shares memory with the source.
        value = present(values, source).view(_given(values, size))
        check_tensor(spec, value.dtype, tuple(value.shape), "its result")
        values[result] = value

    return run


def _number(function: Callable[..., Any], args: tuple[int, ...]) -> Step:
    def run(values: Values) -> None:
        result = function(*(_given(values, number) for number in args[:-1]))
        if type(result) is int and not -(2**63) <= result < 2**63:
            raise ArtifactError(f"{result} does not fit in 64 bits.")
        values[args[-1]] = result

    return run


def _given(values: Values, number: int) -> Any:
    value = values[number]
    if isinstance(value, ValueList):
        return [None if item is None else values[item] for item in value.items]
    return value


class _Operator:
    """A call of torch's operator of a kernel's name."""

    def __init__(
        self, name: str, args: tuple[int, ...], method: Method, memory: MethodMemory
    ) -> None:
        space, _, rest = name.partition("::")
        packet, _, overload = rest.partition(".")
        if packet == "remainder" and not dtype_of(_spec(method, args[-1], name)).is_floating_point:
            # ExecuTorch's integer remainder is C++'s, which has the other sign than torch's.
            packet = "fmod"
        self._call = getattr(getattr(getattr(torch.ops, space), packet), overload or "default")
        schema = self._call._schema
        self._memory = memory
        self._in_place = name in IN_PLACE
        # After the arguments, the plan repeats what is returned, several results as one list.
        _expect(args, len(schema.arguments) + 1, name)
        self._positional: list[tuple[int, str]] = []
        self._named: list[tuple[str, int, str]] = []
        self._results: dict[str, tuple[int, ...]] = {}
        for argument, number in zip(schema.arguments, args, strict=False):
            if argument.is_out:
                self._results[argument.name] = _members(method, number)
            elif argument.kwarg_only:
                self._named.append((argument.name, number, str(argument.type)))
            else:
                self._positional.append((number, str(argument.type)))
        self._dtypes = {
            key: [dtype_of(_spec(method, number, name)) for number in numbers]
            for key, numbers in self._results.items()
        }
        self._lists = {
            argument.name for argument in schema.arguments if "List[" in str(argument.type)
        }
        if self._in_place and _spec(method, args[0], name).constant:
            raise ArtifactError(f"Kernel '{name}' of method '{method.name}' changes a constant.")

    def run(self, values: Values) -> None:
        """Call the operator on `values` and store what it gives."""
        positional = [_argument(_given(values, at), kind) for at, kind in self._positional]
        named = {key: _argument(_given(values, at), kind) for key, at, kind in self._named}
        if self._in_place:
            self._call(*positional, **named)
            return
        # A first pass over shapes alone refuses a result that is too large before it is made.
        shapes = self._results_on("meta", *_on_meta(positional, named))
        for key, numbers in self._results.items():
            for number, item in zip(numbers, shapes[key], strict=True):
                self._memory.check(number, item.dtype, tuple(item.shape), "its result")
        results = self._results_on("cpu", positional, named)
        for key, numbers in self._results.items():
            for number, item in zip(numbers, results[key], strict=True):
                self._memory.store(values, number, item, "its result")

    def _results_on(
        self, device: str, positional: list[Any], named: dict[str, Any]
    ) -> dict[str, list[torch.Tensor]]:
        made = {
            key: [torch.empty(0, dtype=dtype, device=device) for dtype in dtypes]
            for key, dtypes in self._dtypes.items()
        }
        given = {key: items if key in self._lists else items[0] for key, items in made.items()}
        self._call(*positional, **named, **given)
        return made


def _members(method: Method, number: int) -> tuple[int, ...]:
    value = method.values[number]
    if isinstance(value, ValueList):
        return tuple(item for item in value.items if item is not None)
    return (number,)


def _spec(method: Method, number: int, name: str) -> TensorSpec:
    value = method.values[number]
    if not isinstance(value, TensorSpec):
        raise ArtifactError(f"Kernel '{name}' is to give {value!r}, not a tensor.")
    return value


def _argument(value: Any, kind: str) -> Any:
    """Return `value` as torch takes it where the schema says `kind`."""
    if "MemoryFormat" in kind:
        # Contiguous or preserving; every tensor here is contiguous.
        if value not in (None, 0, 1):
            raise ArtifactError(f"the memory format {value} is not supported.")
        return None
    if "ScalarType" in kind and isinstance(value, int):
        name, _ = SCALAR_TYPES.get(value, ("", 0))
        return getattr(torch, name, value)
    return value


def _on_meta(positional: Sequence[Any], named: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    def moved(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.to("meta")
        return [moved(item) for item in value] if isinstance(value, list) else value

    return [moved(value) for value in positional], {key: moved(v) for key, v in named.items()}
