"""Operations on weights that stay packed: what a memory budget leaves unexpanded.

A matrix product takes the weight one slice after the other, a look-up only the rows that it reads;
any other operation gets the weight expanded for the time of the call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.nn import functional as F

from llm_coreml.reference.ops import OPS
from llm_coreml.reference.ops.indexing import wrapped
from llm_coreml.reference.program.constants import PackedWeight


def packed_function(
    operation: str, function: Callable[..., Any], packed: frozenset[str], fixed: Mapping[str, Any]
) -> Callable[..., Any]:
    """Return a function like `function` whose parameters `packed` are packed weights.

    Args:
        operation: MIL's name.
        function: what computes it on tensors.
        packed: names of the parameters.
        fixed: the operation's constant parameters.
    """
    plain = function is OPS[operation].function
    if operation == "linear" and "weight" in packed <= {"weight", "bias"} and plain:
        return linear
    leading = fixed.get("axis", 0) == 0 and not fixed.get("batch_dims", 0)
    if operation == "gather" and packed == {"x"} and leading:
        return gather

    def expanding(**arguments: Any) -> Any:
        for name in packed:
            arguments[name] = arguments[name].expand()
        return function(**arguments)

    return expanding


def linear(
    x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | PackedWeight | None = None
) -> torch.Tensor:
    """Return x [..., in] @ weight [out, in].T + bias [out]."""
    if isinstance(bias, PackedWeight):
        bias = bias.expand()
    parts = [
        F.linear(x, part, None if bias is None else bias[start:stop])
        for start, stop, part in weight.slices()
    ]
    return torch.cat(parts, -1)


def gather(
    x: PackedWeight,
    indices: torch.Tensor,
    axis: int = 0,
    batch_dims: int = 0,
    validate_indices: bool = False,
) -> torch.Tensor:
    """Return the rows of x [N, *D] at indices [*I], as [*I, *D]; axis and batch_dims are 0."""
    places = wrapped(indices, x.rows)
    taken = x.take(places.reshape(-1))
    return taken.reshape(*indices.shape, *taken.shape[1:])
