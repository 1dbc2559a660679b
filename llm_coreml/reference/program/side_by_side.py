"""Several calls of one program at once, for which a weight that stays packed is expanded once.

    run_side_by_side(compiled, [values_of_first, values_of_second], on_rows)

The rows of all calls are multiplied together, so that sums of fp32 are in another order than in a
call by itself; but for that the results are its own.

Each call goes on alone until it needs such a weight, and waits there for the others. A call that
continues another's sequence shares its states: what it needs of them has been written by then,
since a layer reads what that very layer wrote. So it is for programs that write states in place
only, see `Compiled.in_place`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.nn import functional as F

from llm_coreml.reference.program.compiler import Compiled
from llm_coreml.reference.program.constants import PackedWeight
from llm_coreml.reference.program.packed_weights import linear
from llm_coreml.reference.program.steps import Step, Values, run_all

# Called with a packed weight and its next rows, whenever they are expanded for a product.
OnRows = Callable[[PackedWeight, torch.Tensor], None]


def run_side_by_side(compiled: Compiled, calls: Sequence[Values], on_rows: OnRows) -> None:
    """Run the steps of a program for several calls.

    Args:
        compiled: The program.
        calls: The values of every call before the first step; changed.
        on_rows: See there.

    Raises:
        ArtifactError: the program contradicts itself.
    """
    alone: list[Step] = []
    for step in compiled.steps:
        if step.call.function is not linear:
            alone.append(step)
            continue
        for values in calls:
            run_all(alone, values)
        alone = []
        _multiply(step, calls, on_rows)
    for values in calls:
        run_all(alone, values)


def _multiply(step: Step, calls: Sequence[Values], on_rows: OnRows) -> None:
    """Compute a product with a packed weight for every call; see `packed_weights.linear`."""
    given = [step.call.arguments(values) for values in calls]
    weight, bias = given[0]["weight"], given[0].get("bias")
    if isinstance(bias, PackedWeight):
        bias = bias.expand()
    apart = [_apart(each["x"]) for each in given]
    counts = [len(rows) for rows in apart]
    x = torch.cat(apart)
    # The whole result first: small tensors between large ones would leave gaps in the heap.
    product = x.new_empty(len(x), weight.rows)
    for start, stop, rows in weight.slices():
        on_rows(weight, rows)
        product[:, start:stop] = F.linear(x, rows, None if bias is None else bias[start:stop])
    for values, each, part in zip(calls, given, torch.split(product, counts), strict=True):
        shape = each["x"].shape[:-1]
        places = torch.arange(shape.numel(), device=part.device).clamp(max=len(part) - 1)
        step.keep(values, part[places].reshape(*shape, weight.rows))
        for slot in step.frees:
            values[slot] = None


def _apart(x: torch.Tensor) -> torch.Tensor:
    """Return the rows of `x` `[..., in]` without those at the end that repeat the last.

    Pads of a chunk are such: they are read as its last token, and their products are its own.
    """
    rows = x.reshape(-1, x.shape[-1])
    differs = (rows[:-1] != rows[-1]).any(-1).nonzero()
    return rows[: int(differs[-1]) + 2] if len(differs) else rows[:1]
