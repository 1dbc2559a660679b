"""Two programs read the same tokens, and every operation of one is held against the other's.

run = read_in_pairs(first, second, windows)
run.parting.first(1e-2), run.parting.by_layer()
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from llm_coreml.errors import ConfigError
from llm_coreml.reference.observe.alignment import Trace, Traced, align
from llm_coreml.reference.observe.divergence import Parting
from llm_coreml.reference.observe.lockstep import Lockstep
from llm_coreml.reference.observe.watch import Watch
from llm_coreml.runtime.reference import ReferenceRunner
from llm_coreml.runtime.runner import split_lengths


@dataclass(frozen=True, eq=False)
class PairRun:
    """What two programs did on the same tokens.

    Attributes:
        parting: Errors of paired operations.
        watches: Sizes of each program's values.
        paired: Number of paired operations.
        alone: Operations without a partner by type, for each program.
        equal: All operations are paired, and all their results and the logits are equal.
    """

    parting: Parting
    watches: tuple[Watch, Watch]
    paired: int
    alone: tuple[dict[str, int], dict[str, int]]
    equal: bool


def chunks(
    lengths: Sequence[int], window: Sequence[int], *, ranged: bool = False
) -> list[list[int]]:
    """Cut what a window gives to a model, all but its last token; see `split_lengths`."""
    parts, start = [], 0
    for length in split_lengths(len(window) - 1, lengths, ranged=ranged):
        parts.append(list(window[start : start + length]))
        start += length
    return parts


def read_in_pairs(
    first: ReferenceRunner,
    second: ReferenceRunner,
    windows: Sequence[Sequence[int]],
    on_progress: Callable[[float], None] = lambda _: None,
) -> PairRun:
    """Feed all windows to both, in chunks of the lengths that both accept.

    Args:
        first: The program that errors are relative to.
        second: Another, or the same in another mode.
        windows: Token windows; the last token of each is left out, as in scoring.
        on_progress: Called with the share done, 0 to 1.

    Raises:
        ConfigError: the two have no common lengths, or a token is unknown to one.
        ArtifactError: a program fails.
    """
    lengths = sorted(set(first.seq_lengths) & set(second.seq_lengths))
    if not lengths:
        raise ConfigError(
            f"The programs take the lengths {list(first.seq_lengths)} and "
            f"{list(second.seq_lengths)}, of which none is the same. Export again with "
            "--seq-lengths that begin with 1."
        )
    ranged = first.ranged and second.ranged
    plan = [chunks(lengths, window, ranged=ranged) for window in windows]
    traces = _trace(first, plan[0][0]), _trace(second, plan[0][0])
    pairs = align(*traces)
    parting = Parting(traces[0])
    watches = Watch(first.program), Watch(second.program)
    lockstep = Lockstep(first.program, second.program, pairs, parting.compare, watches)
    done, total, equal = 0, sum(map(len, plan)), True
    for window in plan:
        first.reset()
        second.reset()
        for chunk in window:
            rows = lockstep.run(partial(first.step, chunk), partial(second.step, chunk))
            equal = equal and torch.allclose(*rows, rtol=0, atol=0, equal_nan=True)
            done += 1
            on_progress(done / total)
    alone = tuple(
        _alone(trace, {pair[side] for pair in pairs}) for side, trace in enumerate(traces)
    )
    equal = equal and not any(alone) and not any(entry.error for entry in parting.operations)
    return PairRun(parting, watches, len(pairs), (alone[0], alone[1]), equal)


def _trace(runner: ReferenceRunner, chunk: Sequence[int]) -> list[Traced]:
    """Return the operations of a call, and leave the cache empty."""
    trace = Trace()
    runner.reset()
    with runner.program.observed(trace):
        runner.step(chunk)
    runner.reset()
    return trace.operations


def _alone(operations: Sequence[Traced], paired: set[int]) -> dict[str, int]:
    left = (item.kind[0] for at, item in enumerate(operations) if at not in paired)
    return dict(Counter(left).most_common())
