"""What an evaluation found, as data and as JSON.

result = evaluate("out/")
result.artifact.perplexity, result.artifact.mean_kl
result.to_json()
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from llm_coreml.eval.metrics import Metric
from llm_coreml.plain_table import PlainTable

RESULTS_VERSION = 1


@dataclass(frozen=True)
class Quality:
    """How well one model predicts the text, and how far it is from the original.

    Attributes:
        name: `original`, `quantized` (eager, fp32) or `artifact`.
        runtime: What produced the figures.
        figures: Values by the name of the metric, those that could be measured.
        metrics: What was asked for, in the order of tables and JSON.
    """

    name: str
    runtime: str
    figures: Mapping[str, float]
    metrics: tuple[Metric, ...] = field(repr=False)

    @property
    def perplexity(self) -> float:
        """Exp of the mean cost per token; KeyError if it was not asked for."""
        return self.figures["perplexity"]

    @property
    def mean_kl(self) -> float | None:
        """Mean KL(original || this) per token, in nats; None without an original."""
        return self.figures.get("mean_kl")

    @property
    def p99_kl(self) -> float | None:
        """The 99th percentile of that divergence."""
        return self.figures.get("p99_kl")

    @property
    def top1_agreement(self) -> float | None:
        """Share of tokens with the same most likely next token."""
        return self.figures.get("top1_agreement")

    def to_json(self) -> dict[str, Any]:
        """Return name, runtime and every figure under its name, None where there is none."""
        figures = {metric.name: self.figures.get(metric.name) for metric in self.metrics}
        return {"name": self.name, "runtime": self.runtime, **figures}


@dataclass(frozen=True)
class Latency:
    """Median seconds of one call of `tokens` tokens.

    Attributes:
        runtime: What produced the figure; never a prediction for a device.
        tokens: Length of the call; 1 is decode.
        seconds: Median.
        runs: Calls timed, after one that is not.
    """

    runtime: str
    tokens: int
    seconds: float
    runs: int

    @property
    def tokens_per_second(self) -> float:
        """Throughput of the median call."""
        return self.tokens / self.seconds


@dataclass(frozen=True)
class DeviceFigures:
    """What one device was found to do with the program.

    Attributes:
        name: What its owner calls it.
        runner: `cpp` or `swift`.
        executorch: Version of the runtime.
        system: Name, version and machine, as the system tells them.
        prompt_tokens: How many tokens were read.
        new_tokens: How many were made.
        runs: How often it was done.
        runs_agree: Every time gave the same tokens.
        load_seconds: Until the program was loaded.
        time_to_first_token_seconds: Median over the runs.
        tokens_per_second: Median over the runs, of all tokens after the first.
        peak_memory_bytes: Most memory of the process.
    """

    name: str
    runner: str
    executorch: str
    system: str
    prompt_tokens: int
    new_tokens: int
    runs: int
    runs_agree: bool
    load_seconds: float
    time_to_first_token_seconds: float
    tokens_per_second: float | None
    peak_memory_bytes: int


@dataclass(frozen=True)
class Evaluation:
    """Everything that `evaluate` measures.

    Attributes:
        text: Name of the text.
        tokens: Tokens scored, the same for every model.
        window: Longest run of tokens read from an empty cache.
        qualities: The original, the quantized and the artifact, as far as they were at hand.
        latencies: One entry for each length of the program.
        bytes: Size of every part, by name.
        bits_per_weight: Stored bits per weight, a tied table counted once.
        source: What was exported, and the hash of its weights.
        program_sha256: The measured file.
        mode: Numerics of the reference runtime, see `reference.program.numerics`.
        device: Where it computed.
        devices: Figures of devices, which were imported before.
    """

    text: str
    tokens: int
    window: int
    qualities: tuple[Quality, ...]
    latencies: tuple[Latency, ...]
    bytes: dict[str, int]
    bits_per_weight: float
    source: dict[str, Any]
    program_sha256: str
    mode: str = "declared"
    device: str = "cpu"
    devices: tuple[DeviceFigures, ...] = ()

    @property
    def artifact(self) -> Quality:
        """The figures of the `.pte`."""
        return self.qualities[-1]

    def __str__(self) -> str:
        return str(self._table())

    def _repr_html_(self) -> str:
        return self._table().html()

    def _table(self) -> PlainTable:
        """Return the figures of each model, a row each."""
        metrics = self.artifact.metrics
        rows = [
            (each.name, *(metric.shown(each.figures.get(metric.name)) for metric in metrics))
            for each in self.qualities
        ]
        title = f"{self.tokens:,} tokens of {self.text}, {self.bits_per_weight:.2f} bits per weight"
        return PlainTable(title, ("", *(metric.label for metric in metrics)), tuple(rows))

    def quality(self, name: str) -> Quality:
        """Return the figures of `original`, `quantized` or `artifact`; KeyError if not measured."""
        return {quality.name: quality for quality in self.qualities}[name]

    def to_json(self) -> dict[str, Any]:
        """Return the content of `results.json`."""
        return {
            "version": RESULTS_VERSION,
            "text": self.text,
            "tokens": self.tokens,
            "window": self.window,
            "qualities": [quality.to_json() for quality in self.qualities],
            "latencies": [
                {**asdict(latency), "tokens_per_second": latency.tokens_per_second}
                for latency in self.latencies
            ],
            "bytes": self.bytes,
            "bits_per_weight": self.bits_per_weight,
            "source": self.source,
            "program_sha256": self.program_sha256,
            "mode": self.mode,
            "device": self.device,
            "devices": [asdict(device) for device in self.devices],
        }
