"""What a decoder is, as data: its layers one by one, and what they share.

A family turns its `config.json` into a `DecoderSpec`; nothing below this line knows
the name of a family. New architectures add fields here, not branches in callers.

    layer = LayerSpec(AttentionSpec(32, 8, 64, norm=NormSpec()), MLPSpec(8192, norm=NormSpec()))
    spec = DecoderSpec("llama", vocab_size=128256, ..., layers=16 * (layer,))
    spec.layers[0].mixer.num_queries_per_kv
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from llm_coreml.decoder.attention_spec import AttentionSpec as AttentionSpec
from llm_coreml.decoder.attention_spec import CacheSizes as CacheSizes
from llm_coreml.decoder.attention_spec import Extent as Extent
from llm_coreml.decoder.attention_spec import MaskKey as MaskKey
from llm_coreml.decoder.attention_spec import QKNormSpec as QKNormSpec
from llm_coreml.decoder.attention_spec import QueryGrowth as QueryGrowth
from llm_coreml.decoder.norm_spec import NormSpec as NormSpec
from llm_coreml.decoder.norm_spec import check_size
from llm_coreml.decoder.rope_spec import RopeSpec as RopeSpec
from llm_coreml.errors import CheckpointError

Activation = Literal["silu", "gelu", "gelu_tanh", "quick_gelu", "relu", "relu2", "xielu"]


@dataclass(frozen=True)
class MLPSpec:
    """A feed-forward layer: `down(act(gate(x)) * up(x))`, or `down(act(up(x)))` without a gate.

    Attributes:
        intermediate_size: Width between the two.
        norm: Of what enters; None reads the residual stream as it is.
        out_norm: Of what is added to the residual stream.
        inner_norm: Of what the last matrix reads.
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
    inner_norm: NormSpec | None = None
    activation: Activation = "silu"
    gated: bool = True
    bias: bool = False

    def __post_init__(self) -> None:
        check_size("intermediate_size", self.intermediate_size)

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
        sums_normed: The norms of what a part adds are taken of the sum, which is the residual
            stream from then on.
    """

    mixer: AttentionSpec
    feed_forward: MLPSpec
    parallel: bool = False
    scaled: bool = False
    sums_normed: bool = False


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
        check_size("vocab_size_per_layer_input", self.vocab_size)
        check_size("hidden_size_per_layer_input", self.width)


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
        folded_width: Of the rows of the token table as they are stored, if matrices that are folded
            into the table and the head make them as wide as the residual stream.
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
    folded_width: int | None = None
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_multiplier: float = 1.0
    logits_softcap: float | None = None

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "max_position_embeddings"):
            check_size(name, getattr(self, name))
        check_size("num_hidden_layers", len(self.layers))
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
