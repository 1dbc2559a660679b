"""Log-likelihoods of continuations, where no beginning that requests share is read twice.

for at, answer in score(runner, [([1, 5, 8], [9]), ([1, 5, 8], [4, 2])], longest=512):
    answer.logprob, answer.greedy

Requests are taken in the order of their tokens, so that those with a common beginning follow one
another, and each goes on in the cache where the one before parts from it. What is read for several
(the choices of a question, where each is one token) is read once.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from llm_coreml.errors import ArtifactError, ConfigError
from llm_coreml.fidelity import negative_log_likelihood
from llm_coreml.runtime.runner import Runner


class Answer(NamedTuple):
    """What a model says of a continuation.

    Attributes:
        logprob: Log of its probability after the context, in nats.
        greedy: Each of its tokens is the most likely one.
    """

    logprob: float
    greedy: bool


class _Asked(NamedTuple):
    read: tuple[int, ...]
    at: int
    continuation: Sequence[int]


def score(
    runner: Runner, requests: Sequence[tuple[Sequence[int], Sequence[int]]], longest: int
) -> Iterator[tuple[int, Answer]]:
    """Yield the place and the answer of each request, in the order that reads the least.

    Args:
        runner: Reads.
        requests: Tokens of a context, at least one, and of its continuation.
        longest: Most tokens to read at once; of a longer context the end is read.

    Raises:
        ArtifactError: the logits are no numbers.
        ConfigError: a continuation is longer than that.
    """
    asked = [_asked(at, *request, longest) for at, request in enumerate(requests)]
    read: tuple[int, ...] = ()
    rows = torch.empty(0, runner.vocab_size)
    for new, group in itertools.groupby(sorted(asked), lambda each: each.read):
        same = list(group)
        rows = _rows(runner, new, max(len(each.continuation) for each in same), read, rows)
        read = new
        for each in same:
            yield each.at, _answer(rows[len(rows) - len(each.continuation) :], each.continuation)


def _rows(
    runner: Runner, new: tuple[int, ...], count: int, read: tuple[int, ...], known: torch.Tensor
) -> torch.Tensor:
    """Return the logits after each of the last `count` of `new`; `known` are the last of `read`."""
    first, start = len(new) - count, len(read) - len(known)
    parted = (at for at, (one, other) in enumerate(zip(new, read, strict=False)) if one != other)
    common = next(parted, min(len(new), len(read)))
    kept = known[first - start : common - start] if start <= first < common else known[:0]
    if len(kept) == count:
        return kept
    rows = torch.cat([kept, runner.rows_after(new, count - len(kept))])
    if rows.isnan().any():
        raise ArtifactError(
            f"The program's logits are no numbers (NaN) after {len(new)} tokens, so that nothing "
            "can be scored; `llm-coreml inspect --numerics` finds where that begins."
        )
    return rows


def _asked(at: int, context: Sequence[int], continuation: Sequence[int], longest: int) -> _Asked:
    if len(continuation) > longest:
        raise ConfigError(
            f"A continuation of {len(continuation)} tokens does not fit the {longest} positions "
            "of the context; export with a larger --context, or leave the task out."
        )
    # The last token is foretold, and not read.
    return _Asked(tuple([*context, *continuation][-(longest + 1) : -1]), at, continuation)


def _answer(rows: torch.Tensor, continuation: Sequence[int]) -> Answer:
    """Return the answer for a continuation of which `rows` are the predictions."""
    if not continuation:
        return Answer(0.0, True)
    targets = torch.tensor(continuation)
    logprob = -float(negative_log_likelihood(rows, targets).sum())
    return Answer(logprob, bool((rows.argmax(-1) == targets).all()))
