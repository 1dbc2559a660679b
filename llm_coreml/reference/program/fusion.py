"""Runs of operations compiled by torch's inductor, for programs that are executed without rounding.

A compiler keeps what it fuses in fp32, so values that a program declares fp16 would not be rounded
between operations. Only the mode `fp32`, which rounds nothing, is therefore compiled. What looks at
data in Python (reads by index, writes to a state) stays outside of the compiled runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from llm_coreml.artifact.limits import reason
from llm_coreml.errors import ConfigError
from llm_coreml.reference.program.constants import PackedWeight
from llm_coreml.reference.program.steps import Step, Values

# Operations that compute with whole tensors only.
_FUSED = frozenset(
    [
        "abs",
        "add",
        "concat",
        "einsum",
        "erf",
        "exp",
        "expand_dims",
        "gelu",
        "layer_norm",
        "linear",
        "linear_activation",
        "matmul",
        "maximum",
        "minimum",
        "mul",
        "pow",
        "real_div",
        "reduce_max",
        "reduce_mean",
        "reduce_min",
        "reduce_sum",
        "reduce_sum_square",
        "relu",
        "reshape",
        "rsqrt",
        "select",
        "sigmoid",
        "silu",
        "softmax",
        "split",
        "sqrt",
        "square",
        "squeeze",
        "sub",
        "tanh",
        "transpose",
    ]
)
# A shorter run is not worth a compilation.
_SHORTEST = 4


def fused(
    steps: Sequence[Step],
    initial: Values,
    settles: Callable[[Step], bool],
    run: Callable[[Step], Callable[[Values], None]],
) -> list[Callable[[Values], None]]:
    """Return what `steps` do, with runs of fusible ones compiled at their first call.

    Args:
        steps: in order; their `frees` name what nobody needs afterwards.
        initial: the values before the first step.
        settles: whether the input shapes decide the shapes of a step's results.
        run: turns a step into a function of the values.
    """
    parts: list[Callable[[Values], None]] = []
    group: list[Step] = []

    def close() -> None:
        if len(group) < _SHORTEST:
            parts.extend(run(step) for step in group)
        else:
            parts.append(_Fused(tuple(group)))
        group.clear()

    for step in steps:
        if settles(step) and _fusible(step, initial):
            group.append(step)
            continue
        close()
        parts.append(run(step))
    close()
    return parts


def _fusible(step: Step, initial: Values) -> bool:
    floating = all(output.dtype.is_floating_point for output in step.outputs)
    packed = any(isinstance(initial[slot], PackedWeight) for slot in step.operands())
    dynamic = bool(step.call.dynamic & step.call.places.keys())
    return step.type in _FUSED and floating and not packed and not dynamic


class _Fused:
    """Several steps as one function of tensors."""

    def __init__(self, steps: Sequence[Step]) -> None:
        self.steps = steps
        made = {output.slot for step in steps for output in step.outputs}
        freed = {slot for step in steps for slot in step.frees}
        self.inputs = sorted({slot for step in steps for slot in step.operands()} - made)
        self.outputs = sorted(made - freed)
        self.frees = sorted(freed - made)
        self.compiled: Callable[..., Any] | None = None

    def __call__(self, values: Values) -> None:
        given = [values[slot] for slot in self.inputs]
        if self.compiled is None:
            self.compiled = self._compile(given)
        for slot, result in zip(self.outputs, self.compiled(*given), strict=True):
            values[slot] = result
        for slot in self.frees:
            values[slot] = None

    def _compile(self, given: list[torch.Tensor]) -> Callable[..., Any]:
        from torch._inductor import compile as compile_graph
        from torch.fx.experimental.proxy_tensor import make_fx

        try:
            graph = make_fx(self._run)(*given)
            compiled: Callable[..., Any] = compile_graph(graph, list(given))
        except Exception as error:
            # Inductor's own errors have no common base; most often a C++ compiler is missing.
            raise ConfigError(
                f"torch cannot compile the program here ({reason(error)}); install a C++ "
                "compiler, or leave compilation out."
            ) from error
        return compiled

    def _run(self, *given: torch.Tensor) -> list[torch.Tensor]:
        values: Any = dict(zip(self.inputs, given, strict=True))
        for step in self.steps:
            result = step.compute(values)
            results = result if isinstance(result, (tuple, list)) else (result,)
            for output, item in zip(step.outputs, results, strict=True):
                values[output.slot] = item
        # A view of an input would alias it in some compilations and not in others.
        return [values[slot].clone() for slot in self.outputs]
