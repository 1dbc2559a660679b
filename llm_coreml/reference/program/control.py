"""Control flow: a branch and a loop, whose blocks are steps over the same list of values."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from llm_coreml.errors import ArtifactError
from llm_coreml.reference.program.steps import Compute, Step, Values, run_all

CONTROL = ("cond", "while_loop")
# A program whose loops never end must not hang its judge.
_MOST_ROUNDS = 1 << 20

# Steps, places of the results, places of the inputs.
Compiled = tuple[Sequence[Step], Sequence[int], Sequence[int]]


class Rounds:
    """How often the loops of one call may still run, nested ones included."""

    def __init__(self) -> None:
        self.left = 0
        self.reset()

    def reset(self) -> None:
        """Begin a call."""
        self.left = _MOST_ROUNDS

    def spend(self) -> None:
        """Count a round.

        Raises:
            ArtifactError: there were too many.
        """
        self.left -= 1
        if self.left < 0:
            raise ArtifactError(f"does not end within {_MOST_ROUNDS} rounds")


def branches(given: Sequence[int], true: Compiled, false: Compiled) -> Compute:
    """Return `cond`: run the block that the predicate at `given[0]` chooses; give its results."""

    def compute(values: Values) -> tuple[torch.Tensor, ...]:
        steps, results, _ = true if _truth(values[given[0]]) else false
        run_all(steps, values)
        return tuple(values[slot] for slot in results)

    return compute


def loop(given: Sequence[int], condition: Compiled, body: Compiled, rounds: Rounds) -> Compute:
    """Return `while_loop`: run `body` on what the loop carries as long as `condition` gives true.

    The returned function raises ArtifactError when the call's rounds are spent.
    """

    def compute(values: Values) -> tuple[torch.Tensor, ...]:
        carried = tuple(values[slot] for slot in given)
        while True:
            (truth,) = _run(condition, carried, values)
            if not _truth(truth):
                return carried
            rounds.spend()
            carried = _run(body, carried, values)

    return compute


def _run(
    block: Compiled, carried: tuple[torch.Tensor, ...], values: Values
) -> tuple[torch.Tensor, ...]:
    steps, results, inputs = block
    for slot, value in zip(inputs, carried, strict=True):
        values[slot] = value
    run_all(steps, values)
    return tuple(values[slot] for slot in results)


def _truth(value: torch.Tensor) -> bool:
    if value.dtype != torch.bool or value.numel() != 1:
        raise ArtifactError(f"is decided by {value.dtype}{list(value.shape)}, not by one bool")
    return bool(value.item())
