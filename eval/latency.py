"""Seconds per call, by length. On this machine, by the named runtime: no device is predicted."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from llm_coreml.eval.llama_statistics import percentiles
from llm_coreml.eval.timings import Latency
from llm_coreml.runtime.runner import Runner

_RUNS = 5
_ENOUGH_SECONDS = 10.0
_MANY = 32
_SOME = (1, 8, 64, 512)


def measure_latency(
    runner: Runner, tokens: Sequence[int], on_progress: Callable[[float], None] = lambda _: None
) -> tuple[Latency, ...]:
    """Time each of the runner's lengths on the first of `tokens`, repeated where they are few.

    Of a runner that takes every length, a few are timed.
    """
    lengths = runner.seq_lengths
    if len(lengths) > _MANY:
        lengths = tuple(length for length in _SOME if length in lengths)
    longest = max(lengths)
    text = (list(tokens) * (longest // len(tokens) + 1))[:longest]
    timed = []
    for length in lengths:
        timed.append(_time(runner, text[:length]))
        on_progress(len(timed) / len(lengths))
    return tuple(timed)


def _time(runner: Runner, chunk: list[int]) -> Latency:
    seconds: list[float] = []
    runner.reset()
    runner.step(chunk)
    while len(seconds) < _RUNS and (len(seconds) < 2 or sum(seconds) < _ENOUGH_SECONDS):
        if runner.position + len(chunk) > runner.context:
            runner.reset()
        start = time.perf_counter()
        runner.step(chunk)
        seconds.append(time.perf_counter() - start)
    p50, p90, p99 = percentiles(seconds)
    return Latency(runner.label, len(chunk), p50, len(seconds), p90, p99)
