"""How soon a program answers: loading, the first token by length of the prompt, each further one.

found = measure_response(runner, load_seconds, tokens)

On this machine, by the named runtime: no device is predicted.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from llm_coreml.eval.llama_statistics import percentiles
from llm_coreml.eval.timings import Decoding, FirstToken, Timing
from llm_coreml.machine import forget_peak, free_memory, peak_memory
from llm_coreml.runtime.runner import Runner

_WARMUPS = 1
_TRIALS = 5
_PROMPTS = (8, 64, 512)
_NEW_TOKENS = 32
# Of one length, or of all new tokens; at least one trial is made.
_ENOUGH_SECONDS = 5.0


def measure_response(runner: Runner, load_seconds: float, tokens: Sequence[int]) -> Timing:
    """Time prompts of several lengths, then single tokens.

    Args:
        runner: What is timed.
        load_seconds: What it took to load, which was measured before.
        tokens: A text, repeated where it is short.
    """
    free_memory()
    forget_peak()
    most = max(1, runner.context // 2)
    lengths = sorted({min(length, most) for length in _PROMPTS})
    text = (list(tokens) * (lengths[-1] // len(tokens) + 1))[: lengths[-1]]
    first = tuple(_first_token(runner, text[:length]) for length in lengths)
    decode = _decoding(runner, text[: lengths[0]])
    return Timing(
        runtime=runner.label,
        warmups=_WARMUPS,
        trials=min(each.trials for each in first),
        load_seconds=load_seconds,
        first_token=first,
        decode=decode,
        peak_memory_bytes=peak_memory(),
    )


def _first_token(runner: Runner, prompt: Sequence[int]) -> FirstToken:
    for _ in range(_WARMUPS):
        runner.reset()
        runner.feed(prompt)
    seconds: list[float] = []
    while len(seconds) < _TRIALS and sum(seconds) < _ENOUGH_SECONDS:
        runner.reset()
        start = time.perf_counter()
        runner.feed(prompt)
        seconds.append(time.perf_counter() - start)
    return FirstToken(len(prompt), *percentiles(seconds), len(seconds))


def _decoding(runner: Runner, prompt: Sequence[int]) -> Decoding:
    """Time tokens that the model itself chooses, after one that is not timed."""
    runner.reset()
    row = runner.step([int(runner.feed(prompt).argmax())])[-1]
    seconds: list[float] = []
    room = runner.context - runner.position
    while len(seconds) < min(_NEW_TOKENS, room) and sum(seconds) < _ENOUGH_SECONDS:
        start = time.perf_counter()
        row = runner.step([int(row.argmax())])[-1]
        seconds.append(time.perf_counter() - start)
    return Decoding(len(seconds), *percentiles(seconds), len(seconds) / sum(seconds))
