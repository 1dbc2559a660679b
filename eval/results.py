"""What an evaluation found, as data and as JSON, whose schema is `results.schema.json`.

result = evaluate("out/")
result.artifact.perplexity, result.artifact.mean_kl
result.to_json()
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Literal

from llm_coreml.bundle.typed_json import write_record
from llm_coreml.eval.measures import Measures
from llm_coreml.eval.metrics import Metric
from llm_coreml.eval.timings import Latency, Timing
from llm_coreml.plain_table import PlainTable

# Version 1 had neither windows nor intervals, and no word of what was measured on which machine.
RESULTS_VERSION = 2


@dataclass(frozen=True)
class Quality:
    """How well one model predicts the text, and how far it is from the original.

    Attributes:
        name: `original`, `quantized` (eager, fp32) or `artifact`.
        runtime: What produced the figures.
        figures: Values by the name of the metric, those that could be measured.
        metrics: What was asked for, in the order of tables and JSON.
        measures: What else was found; None if figures alone were asked for.
    """

    name: str
    runtime: str
    figures: Mapping[str, float]
    metrics: tuple[Metric, ...] = field(repr=False)
    measures: Measures | None = field(default=None, repr=False)

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
        found = {"name": self.name, "runtime": self.runtime, **figures}
        if self.measures is None:
            return found
        further = write_record(self.measures)
        return {**found, **further.pop("figures"), **further}


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
class Tool:
    """What measured.

    Attributes:
        name: Of the program.
        version: Of the program.
    """

    name: str
    version: str


@dataclass(frozen=True)
class Machine:
    """Where it was measured.

    Attributes:
        system: Name and version of the operating system.
        machine: Its instruction set.
        cores: How many this process may use.
        memory_bytes: How much memory there is.
    """

    system: str
    machine: str
    cores: int
    memory_bytes: int


@dataclass(frozen=True)
class Subject:
    """What was measured.

    Attributes:
        kind: What it is.
        name: Its own name, without the path to it.
        sha256: Of the `.pte`; of an eager model, of its weights; else of the folder's files.
    """

    kind: Literal["bundle", "pte", "mlpackage", "eager"]
    name: str
    sha256: str


@dataclass(frozen=True)
class Export:
    """How it was exported, as far as results are told apart by it; the manifest tells all.

    Attributes:
        format: The format of the linear layers, in words.
        scheme: Its name.
        bits: Bits of a code; None if they differ.
        embedding_format: The format of the token table.
        head_format: The format of the head.
        calibrated: Codes were chosen on a text.
        target: Name of the target.
        backend: `coreml` or `xnnpack`.
        minimum_os: Oldest system.
        compute_precision: Precision of activations.
        logits: Which rows a call gives.
        context: Positions of the cache.
        seq_lengths: Lengths of a call.
        manifest_checksum: Of the manifest; None where there is none in it.
    """

    format: str
    scheme: str
    bits: int | None
    embedding_format: str
    head_format: str
    calibrated: bool
    target: str
    backend: str
    minimum_os: str
    compute_precision: str
    logits: Literal["last", "all"]
    context: int
    seq_lengths: tuple[int, ...]
    manifest_checksum: str | None = None


@dataclass(frozen=True)
class Window:
    """A piece of the text that was read from an empty cache.

    Attributes:
        tokens: Tokens scored.
        words: Words among them, parted by white space as lm-eval parts them.
        bytes: Their length in UTF-8.
    """

    tokens: int
    words: int
    bytes: int


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
        bits_per_weight: Stored bits of all matrices, with scales, zero points and tables, by their
            weights; a tied table counted once. None where no manifest tells.
        source: What was exported, and the hash of its weights; None if nobody knows.
        program_sha256: The measured file; None if it is no `.pte`.
        mode: Numerics of the reference runtime, see `reference.program.numerics`.
        device: Where it computed.
        devices: Figures of devices, which were imported before.
        subject: What was measured.
        export: How it was exported; None without a manifest.
        program_bytes: What a device loads: the program, and weight files beside it.
        bits_per_weight_parts: Stored bits per weight of linear layers, token table and head.
        latency: Load, first token and decoding; None if they were not timed.
        text_sha256: Hash of the whole text; of tokens, where there is none.
        words: Words of the text that was scored.
        text_bytes: Its length in UTF-8.
        windows: Its pieces; empty in results of single figures.
        created: When, in UTC.
        tool: What measured.
        machine: Where.
    """

    text: str
    tokens: int
    window: int
    qualities: tuple[Quality, ...]
    latencies: tuple[Latency, ...]
    bytes: dict[str, int]
    bits_per_weight: float | None
    source: dict[str, Any] | None
    program_sha256: str | None
    mode: str = "declared"
    device: str = "cpu"
    devices: tuple[DeviceFigures, ...] = ()
    subject: Subject | None = None
    export: Export | None = None
    program_bytes: int = 0
    bits_per_weight_parts: Mapping[str, float] | None = None
    latency: Timing | None = None
    text_sha256: str = ""
    words: int = 0
    text_bytes: int = 0
    windows: tuple[Window, ...] = ()
    created: str = ""
    tool: Tool | None = None
    machine: Machine | None = None

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
        bits = self.bits_per_weight
        told = "" if bits is None else f", {bits:.2f} bits per weight"
        title = f"{self.tokens:,} tokens of {self.text}{told}"
        return PlainTable(title, ("", *(metric.label for metric in metrics)), tuple(rows))

    def quality(self, name: str) -> Quality:
        """Return the figures of `original`, `quantized` or `artifact`; KeyError if not measured."""
        return {quality.name: quality for quality in self.qualities}[name]

    def to_json(self) -> dict[str, Any]:
        """Return the content of `results.json`."""
        written: dict[str, Any] = {"version": RESULTS_VERSION}
        for item in fields(self):
            value = getattr(self, item.name)
            written[item.name] = _written(value)
        written["qualities"] = [quality.to_json() for quality in self.qualities]
        return written


def _written(value: Any) -> Any:
    """Return a field's value as JSON, qualities aside."""
    if isinstance(value, Latency):
        return {**write_record(value), "tokens_per_second": value.tokens_per_second}
    if is_dataclass(value):
        return write_record(value)
    if isinstance(value, tuple):
        return [_written(item) for item in value if not isinstance(item, Quality)]
    return dict(value) if isinstance(value, Mapping) else value
