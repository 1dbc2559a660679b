"""What a decoder is, as data: its layers one by one, and what they share.

A family turns its `config.json` into a `DecoderSpec`; nothing below this line knows
the name of a family. New architectures add fields here, not branches in callers.

    layer = LayerSpec(AttentionSpec(32, 8, 64, norm=NormSpec()), MLPSpec(8192, norm=NormSpec()))
    spec = DecoderSpec("llama", vocab_size=128256, ..., layers=16 * (layer,))
    spec.layers[0].mixer.num_queries_per_kv
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from llm_coreml.decoder.rope_spec import RopeSpec as RopeSpec
from llm_coreml.errors import CheckpointError

Activation = Literal["silu", "gelu", "gelu_tanh", "quick_gelu", "relu", "relu2", "xielu"]
# What a mask follows from: query heads of a key/value head, the window, and the heads' slopes.
MaskKey = tuple[int, int | None, tuple[float, ...]]
# What sizes of states are multiples of, which the Neural Engine's compiler asks for.
_STATE_MULTIPLE = 32


@dataclass(frozen=True)
class NormSpec:
    """A norm.

    Attributes:
        eps: Added to the mean square, or to the variance.
        kind: `rms` (root mean square) or `layer` (the mean is taken off first).
        gain: A gain follows.
        bias: And a bias.
    """

    eps: float = 1e-5
    kind: Literal["rms", "layer"] = "rms"
    gain: bool = True
    bias: bool = False


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
    """

    context: int
    spare: int = 0
    longest: int | None = None


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
    qkv_bias: bool = False
    out_bias: bool = False

    def __post_init__(self) -> None:
        for name in ("num_attention_heads", "num_key_value_heads", "head_dim"):
            _check_size(name, getattr(self, name))
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
        """Widths of the heads whose values may be rotated: one, or none behind a gate."""
        return () if self.gate == "number" else (self.head_dim,)

    def check_rotary(self, tables: Sequence[RopeSpec]) -> None:
        """Refuse a rotary table that does not fit. Raises CheckpointError."""
        if self.rope is not None and tables[self.rope].dim > self.head_dim:
            raise CheckpointError(
                f"config.json has {tables[self.rope].dim} numbers of each head rotated, and "
                f"gives head_dim = {self.head_dim}. Download or save the model again."
            )


@dataclass(frozen=True)
class MLPSpec:
    """A feed-forward layer: `down(act(gate(x)) * up(x))`, or `down(act(up(x)))` without a gate.

    Attributes:
        intermediate_size: Width between the two.
        norm: Of what enters; None reads the residual stream as it is.
        out_norm: Of what is added to the residual stream.
        activation: `silu`, `gelu` (by the error function), `gelu_tanh` (by its tanh formula),
            `quick_gelu` (`x * sigmoid(1.702 x)`), `relu`, `relu2` (its square) or `xielu`
            (arXiv 2411.13010), which has two parameters of its own.
        gated: There is a gate.
        bias: All of them have biases.

    Raises:
        CheckpointError: the size is not positive.
    """

    intermediate_size: int
    norm: NormSpec | None = NormSpec()
    out_norm: NormSpec | None = None
    activation: Activation = "silu"
    gated: bool = True
    bias: bool = False

    def __post_init__(self) -> None:
        _check_size("intermediate_size", self.intermediate_size)

    @property
    def widest_sum(self) -> int:
        """Terms of the longest sum of products behind the residual stream."""
        return self.intermediate_size


@dataclass(frozen=True)
class LayerSpec:
    """One layer: what mixes positions, then what each position goes through by itself.

    Attributes:
        mixer: Attention.
        feed_forward: A gated or a plain MLP.
        parallel: Both read the same residual stream, and not the second what the first has
            changed; a feed-forward layer without a norm then reads what attention reads.
        scaled: What leaves is multiplied by a stored number.
    """

    mixer: AttentionSpec
    feed_forward: MLPSpec
    parallel: bool = False
    scaled: bool = False


@dataclass(frozen=True)
class PerLayerSpec:
    """A second token table, of which every layer is given a part of its own.

    To each part is added what a matrix makes of the token's row of the first table. A layer adds
    `out_norm(out(act(gate(x)) * part))` to the residual stream, behind its feed-forward layer.

    Attributes:
        vocab_size: Rows of the table.
        width: Of the part of a layer.
        norm: Of what the matrix gives, a layer's part at a time, and of what is added.
        activation: Between the matrices of a layer.
        table_multiplier: What rows of the table are multiplied by.
        products_multiplier: What the matrix gives is, before its norm.
        sum_multiplier: What the sum of both is.

    Raises:
        CheckpointError: a size is not positive.
    """

    vocab_size: int
    width: int
    norm: NormSpec = NormSpec()
    activation: Activation = "gelu_tanh"
    table_multiplier: float = 1.0
    products_multiplier: float = 1.0
    sum_multiplier: float = 1.0

    def __post_init__(self) -> None:
        _check_size("vocab_size_per_layer_input", self.vocab_size)
        _check_size("hidden_size_per_layer_input", self.width)


@dataclass(frozen=True)
class DecoderSpec:
    """Everything that fixes the decoder's graph and the shapes of its tensors.

    Attributes:
        model_type: The family.
        vocab_size: Rows of the token table and of the head.
        hidden_size: Width of the residual stream.
        max_position_embeddings: The longest context that the model is meant for.
        layers: In order.
        norm: Of what the head reads.
        rotary: Tables of rotary position embedding, which layers name by their index.
        per_layer: What every layer is given of a token beside the residual stream.
        tie_word_embeddings: The head is the token table.
        head_bias: The head has a bias.
        embedding_norm: Of what enters the first layer.
        learned_positions: How many rows a table of learned positions has, which are added to those
            of the token table; None has no such table.
        embedding_multiplier: What rows of the token table are multiplied by.
        residual_multiplier: What every layer's two changes of the residual stream are.
        logits_multiplier: What logits are.
        logits_softcap: Logits become `softcap * tanh(logits / softcap)` at last.

    Raises:
        CheckpointError: a size is not positive, or two sizes contradict each other.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    max_position_embeddings: int
    layers: tuple[LayerSpec, ...]
    norm: NormSpec = NormSpec()
    rotary: tuple[RopeSpec, ...] = ()
    per_layer: PerLayerSpec | None = None
    tie_word_embeddings: bool = False
    head_bias: bool = False
    embedding_norm: NormSpec | None = None
    learned_positions: int | None = None
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_multiplier: float = 1.0
    logits_softcap: float | None = None

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "max_position_embeddings"):
            _check_size(name, getattr(self, name))
        _check_size("num_hidden_layers", len(self.layers))
        for index, layer in enumerate(self.layers):
            layer.mixer.check_rotary(self.rotary)
            self._check_shared(index, layer.mixer)

    def _check_shared(self, index: int, mixer: AttentionSpec) -> None:
        if mixer.shares is None:
            return
        owner = self.layers[mixer.shares].mixer if 0 <= mixer.shares < index else None
        if owner is None or owner.shares is not None or owner.remembers != mixer.remembers:
            raise CheckpointError(
                f"config.json has layer {index} attend to the keys and values of layer "
                f"{mixer.shares}, which has none like its own. Download or save the model again."
            )

    @property
    def shared(self) -> tuple[int, ...]:
        """Layers whose keys and values later ones attend to, in order."""
        found = {layer.mixer.shares for layer in self.layers}
        return tuple(sorted(index for index in found if index is not None))

    @property
    def longest_context(self) -> int:
        """Positions that a context may have: those meant, or those that all scalings give.

        Files of 2023 name the length before a linear scaling, and so do files to which a scaling
        has been added. A table of learned positions ends where it ends.
        """
        meant = self.max_position_embeddings
        if self.learned_positions is not None:
            return self.learned_positions
        return max(meant, min((rope.reach(meant) for rope in self.rotary), default=meant))

    def rewinds(self, extent: Extent) -> int | None:
        """Return how far a sequence can go back, see `CacheSizes.rewinds`."""
        found = (layer.mixer.remembers.rewinds(extent) for layer in self.layers)
        return min((count for count in found if count is not None), default=None)

    @property
    def widest_sum(self) -> int:
        """Terms of the longest sum of products outside attention."""
        return max(self.hidden_size, *(layer.feed_forward.widest_sum for layer in self.layers))

    def to_json(self) -> dict[str, Any]:
        """Return all fields as JSON values, a table for each layer."""
        found = asdict(self)
        return {**found, "layers": list(found["layers"]), "rotary": list(found["rotary"])}


def _check_size(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckpointError(
            f"config.json gives {name} = {value!r}; it must be a positive whole number."
        )
