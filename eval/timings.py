"""How long a program takes on this machine, as data. No device is predicted."""

from __future__ import annotations

from dataclasses import dataclass, field

from llm_coreml.bundle.typed_json import LEFT_OUT


@dataclass(frozen=True)
class Latency:
    """Median seconds of one call of `tokens` tokens.

    Attributes:
        runtime: What produced the figure; never a prediction for a device.
        tokens: Length of the call; 1 is decode.
        seconds: Median.
        runs: Calls timed, after one that is not.
        p90: The 90th percentile of the seconds.
        p99: The 99th.
    """

    runtime: str
    tokens: int
    seconds: float
    runs: int
    p90: float | None = field(default=None, metadata=LEFT_OUT)
    p99: float | None = field(default=None, metadata=LEFT_OUT)

    @property
    def tokens_per_second(self) -> float:
        """Throughput of the median call."""
        return self.tokens / self.seconds


@dataclass(frozen=True)
class FirstToken:
    """Seconds from a prompt to the logits of its first new token.

    Attributes:
        prompt_tokens: Length of the prompt.
        p50: Median over the trials.
        p90: Their 90th percentile.
        p99: Their 99th.
        trials: How often it was read, each time from an empty cache.
    """

    prompt_tokens: int
    p50: float
    p90: float
    p99: float
    trials: int


@dataclass(frozen=True)
class Decoding:
    """Seconds of each new token.

    Attributes:
        tokens: Tokens timed.
        p50: Median.
        p90: The 90th percentile.
        p99: The 99th.
        tokens_per_second: Tokens by the seconds of all.
    """

    tokens: int
    p50: float
    p90: float
    p99: float
    tokens_per_second: float


@dataclass(frozen=True)
class Timing:
    """How fast a program loads, reads and writes.

    Attributes:
        runtime: What ran it.
        warmups: Prompts read before any is timed, for each length.
        trials: How often each was timed.
        load_seconds: Until it was ready for a first call.
        first_token: By length of the prompt, ascending.
        decode: Of single tokens, one after the other.
        peak_memory_bytes: Most memory that the process had meanwhile, libraries and mapped files
            included; where the system does not tell, since it began.
    """

    runtime: str
    warmups: int
    trials: int
    load_seconds: float
    first_token: tuple[FirstToken, ...]
    decode: Decoding
    peak_memory_bytes: int
