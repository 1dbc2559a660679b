"""What attention is, as data, and what it remembers.

AttentionSpec(32, 8, 64)                                # eight heads of keys for 32 of queries
AttentionSpec(8, 1, 256, window=512, qk_norm=QKNormSpec())
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from llm_coreml.decoder.norm_spec import NormSpec, check_size
from llm_coreml.decoder.rope_spec import RopeSpec
from llm_coreml.errors import CheckpointError

# What a mask follows from: query heads of a key/value head, the window, and the heads' slopes.
MaskKey = tuple[int, int | None, tuple[float, ...]]
# What sizes of states are multiples of, which the Neural Engine's compiler asks for.
_STATE_MULTIPLE = 32


@dataclass(frozen=True)
class QKNormSpec:
    """Norms of queries and keys.

    Attributes:
        eps: Added to the mean square, or to the variance.
        over: What is one row: each `head`, or all heads of a token at once.
        rotated: They are normed after they are rotated, and not before.
        kind: As of a `NormSpec`.
        gain: As of a `NormSpec`.
        bias: As of a `NormSpec`.
        own: Each head has a gain and a bias of its own.

    Raises:
        ValueError: what is rotated, or has a gain of its own, is a head.
    """

    eps: float = 1e-5
    over: Literal["head", "all"] = "head"
    rotated: bool = False
    kind: Literal["rms", "layer"] = "rms"
    gain: bool = True
    bias: bool = False
    own: bool = False

    def __post_init__(self) -> None:
        if self.over != "head" and (self.rotated or self.own):
            raise ValueError("Rotated queries and keys are normed head by head.")

    @property
    def norm(self) -> NormSpec:
        """What is done to each row."""
        return NormSpec(self.eps, self.kind, self.gain, self.bias)


@dataclass(frozen=True)
class QueryGrowth:
    """Queries that grow with their position: times `1 + beta * ln(1 + floor(position / length))`.

    Attributes:
        beta: How fast.
        length: Positions of one step; there is no growth within the first.
    """

    beta: float
    length: int


@dataclass(frozen=True)
class Extent:
    """How far the calls of a program reach, by which its states are sized.

    Attributes:
        context: Positions of a sequence.
        spare: Positions beyond the context that the pads of a call may reach.
        longest: The most tokens of a call, pads among them; None is the whole context.
        multiple: What the widths of states are multiples of.
    """

    context: int
    spare: int = 0
    longest: int | None = None
    multiple: int = 1


@dataclass(frozen=True)
class CacheSizes:
    """What the keys and values of a layer are.

    Attributes:
        heads: Key/value heads.
        head_dim: Width of one head.
        window: How many positions a token sees, its own the last; None sees all before it.
    """

    heads: int
    head_dim: int
    window: int | None = None

    def ring(self, extent: Extent) -> int | None:
        """Return how many positions a ring has that holds them; None if no ring saves any.

        A call writes first and then attends to the ring as it lies. What its first token sees and
        all of its own tokens, pads among them, must have places: `window - 1 + longest`. Twice
        the longest call, so that a write that wraps finds its two pieces apart.
        """
        longest = extent.longest or extent.context
        if self.window is None or self.window >= extent.context:
            return None
        least = max(self.window - 1, longest) + longest
        size = -(-least // _STATE_MULTIPLE) * _STATE_MULTIPLE
        return size if size < extent.context else None

    def rewinds(self, extent: Extent) -> int | None:
        """Return how many positions behind the furthest one a sequence can be taken up again.

        None is any number. What a token sees there must not have been written over.
        """
        ring = self.ring(extent)
        return None if ring is None or self.window is None else ring - self.window + 1

    def positions(self, extent: Extent) -> int:
        """Return how many positions the cache of one layer has."""
        return self.ring(extent) or extent.context + extent.spare

    def numbers(self, extent: Extent) -> int:
        """Return how many numbers the keys of one layer are, and its values."""
        return self.heads * self.head_dim * self.positions(extent)


@dataclass(frozen=True)
class AttentionSpec:
    """Causal self-attention, which mixes positions.

    Attributes:
        num_attention_heads: Heads of queries.
        num_key_value_heads: Heads of keys and values, which divide those of queries.
        head_dim: Width of one head.
        norm: Of what enters; None reads the residual stream as it is.
        out_norm: Of what is added to the residual stream.
        inner_norm: Of what all heads give, which the output projection reads.
        rope: Which of the decoder's rotary tables turns queries and keys; None turns neither.
        window: How many positions are seen, each token's own the last; None sees all before it.
        scale: What scores are multiplied by; None is `1 / sqrt(head_dim)`.
        softcap: Scores become `softcap * tanh(scores / softcap)`.
        qk_norm: Norms of queries and keys.
        value_norm: Of each head's values.
        keys_are_values: One matrix makes both; keys alone are normed by `qk_norm` and rotated.
        shares: The earlier layer whose keys and values are attended to; None has its own.
        query_growth: How queries grow with their position.
        alibi: For each head of queries, what its scores lose for each position of distance (ALiBi,
            arXiv 2108.12409).
        sinks: Each head of queries has a score of its own that takes part in the softmax, and
            stands for no value.
        gate: What is attended to is multiplied by the sigmoid of a matrix's products, one for each
            `head` or one for each `number`.
        clip: How far products of queries, keys and values are let from zero.
        qkv_bias: Queries, keys and values have biases.
        out_bias: The output projection has one.

    Raises:
        CheckpointError: a size is not positive, or two contradict each other.
    """

    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    norm: NormSpec | None = NormSpec()
    out_norm: NormSpec | None = None
    inner_norm: NormSpec | None = None
    rope: int | None = 0
    window: int | None = None
    scale: float | None = None
    softcap: float | None = None
    qk_norm: QKNormSpec | None = None
    value_norm: NormSpec | None = None
    keys_are_values: bool = False
    shares: int | None = None
    query_growth: QueryGrowth | None = None
    alibi: tuple[float, ...] = ()
    sinks: bool = False
    gate: Literal["head", "number"] | None = None
    clip: float | None = None
    qkv_bias: bool = False
    out_bias: bool = False

    def __post_init__(self) -> None:
        for name in ("num_attention_heads", "num_key_value_heads", "head_dim"):
            check_size(name, getattr(self, name))
        if self.num_attention_heads % self.num_key_value_heads:
            raise CheckpointError(
                f"config.json gives {self.num_attention_heads} attention heads and "
                f"{self.num_key_value_heads} key/value heads; the first must be a multiple "
                "of the second."
            )
        if self.alibi and len(self.alibi) != self.num_attention_heads:
            raise ValueError("ALiBi needs a slope for each head of queries.")

    @property
    def num_queries_per_kv(self) -> int:
        """Query heads that share one key/value head (1 for plain multi-head attention)."""
        return self.num_attention_heads // self.num_key_value_heads

    @property
    def masks(self) -> tuple[MaskKey, ...]:
        """The masks that it adds to scores: one."""
        return ((self.num_queries_per_kv, self.window, self.alibi),)

    @property
    def remembers(self) -> CacheSizes:
        """What it remembers of each position, or the layer that it shares with does."""
        return CacheSizes(self.num_key_value_heads, self.head_dim, self.window)

    @property
    def value_widths(self) -> tuple[int, ...]:
        """Widths of the heads whose values may be rotated: one, or none."""
        return () if self.changes_numbers else (self.head_dim,)

    @property
    def changes_numbers(self) -> bool:
        """Whether values are gated, clipped or multiplied number by number, on their way."""
        return self.gate == "number" or self.clip is not None or self.inner_norm is not None

    def check_rotary(self, tables: Sequence[RopeSpec]) -> None:
        """Refuse a rotary table that does not fit. Raises CheckpointError."""
        if self.rope is not None and tables[self.rope].dim > self.head_dim:
            raise CheckpointError(
                f"config.json has {tables[self.rope].dim} numbers of each head rotated, and "
                f"gives head_dim = {self.head_dim}. Download or save the model again."
            )
