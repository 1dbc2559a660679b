"""What is found out about a model's predictions beyond single figures, as data.

    found = quality.measures
    found.statistics["Mean KLD"].value, found.intervals["perplexity"], found.buckets[-1].mean_kl

`results.json` holds each under its field's name, see `results.schema.json`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from llm_coreml.bundle.typed_json import LEFT_OUT, named


@dataclass(frozen=True)
class Statistic:
    """A number that llama-perplexity prints.

    Attributes:
        value: The number.
        error: What it prints behind ±; None where it prints none.
    """

    value: float
    error: float | None = field(default=None, metadata=LEFT_OUT)


@dataclass(frozen=True)
class Bucket:
    """The tokens of which the original was so sure.

    Attributes:
        low: Least probability of the original's most likely token.
        high: The next bucket's least, 1 in the last.
        share: Share of all tokens.
        tokens: How many they are.
        mean_kl: Mean divergence, None where there is no token.
        top1_agreement: Share with the same most likely token.
    """

    low: float = field(metadata=named("from"))
    high: float = field(metadata=named("to"))
    share: float
    tokens: int
    mean_kl: float | None = None
    top1_agreement: float | None = None


@dataclass(frozen=True)
class Stretch:
    """The tokens after these positions of all windows.

    Attributes:
        first: First position that was read.
        last: Last position.
        tokens: How many tokens were scored.
        nll: Mean cost in nats.
        mean_kl: Mean divergence; None without an original.
    """

    first: int = field(metadata=named("from"))
    last: int = field(metadata=named("to"))
    tokens: int
    nll: float
    mean_kl: float | None = None


@dataclass(frozen=True)
class NotFinite:
    """Rows of logits that hold inf or NaN, of which no mean is taken.

    Attributes:
        rows: How many there are.
        window: Of the first of them.
        position: In the window.
        token: What was read there.
    """

    rows: int
    window: int
    position: int
    token: int


@dataclass(frozen=True)
class LayerError:
    """How far a model is from the original after a layer.

    Attributes:
        layer: Its number, from 0 on.
        error: Root of the mean square of what the residual stream is off, by that of the stream.
    """

    layer: int
    error: float


@dataclass(frozen=True)
class NoiseFloor:
    """How far the original is from itself with noise as of bfloat16 after each layer.

    Attributes:
        mean_kl: Mean divergence, in nats per token.
        p99_kl: The 99th percentile.
        top1_agreement: Share of tokens with the same most likely next one.
        tokens: How many tokens it was measured on.
    """

    mean_kl: float
    p99_kl: float
    top1_agreement: float
    tokens: int


@dataclass(frozen=True)
class Measures:
    """What is found out beyond the figures of `METRICS`.

    Attributes:
        figures: Further figures by name: word and byte perplexity, bits per byte, and distances.
        intervals: 95 % of each figure, by bootstrap over windows; none for a single window.
        per_window: Means over the tokens of each window by name, in the order of windows.
        statistics: What llama-perplexity prints, under its names.
        buckets: By the confidence of the original.
        positions: By position in the window.
        layers: How far each layer is from the original's; of the quantized model alone.
        noise_floor: What noise does to the original; of it alone.
        not_finite: Rows that are no numbers; then there is no figure.
    """

    figures: Mapping[str, float] = field(default_factory=dict)
    intervals: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    per_window: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    statistics: Mapping[str, Statistic] | None = field(default=None, metadata=LEFT_OUT)
    buckets: tuple[Bucket, ...] | None = field(default=None, metadata=LEFT_OUT)
    positions: tuple[Stretch, ...] | None = field(default=None, metadata=LEFT_OUT)
    layers: tuple[LayerError, ...] | None = field(default=None, metadata=LEFT_OUT)
    noise_floor: NoiseFloor | None = field(default=None, metadata=LEFT_OUT)
    not_finite: NotFinite | None = field(default=None, metadata=LEFT_OUT)
