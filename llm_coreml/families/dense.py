"""What dense families share in their reading of `config.json`: sizes, and Llama's graph of them.

    read = Dense({**DEFAULTS, **config})
    spec = read.alike(LayerSpec(replace(read.attention, qkv_bias=True), read.mlp))

A family takes what is Llama's as it stands and replaces what differs. All is read where it is
asked for, so that a field that a family does not have is not asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, final

from llm_coreml.decoder.spec import (
    Activation,
    AttentionSpec,
    DecoderSpec,
    LayerSpec,
    MLPSpec,
    NormSpec,
    RopeSpec,
)
from llm_coreml.errors import UnsupportedError
from llm_coreml.families.fields import LARGEST_POSITION, flag, number, shown, table, whole, word
from llm_coreml.families.rotary import rope_spec

# Eight times those of the deepest one published; each takes a millisecond to lay out.
_LAYERS = 1024
_EPSILON = 1e-6
_RMS_NORM = NormSpec()
LAYER_NORM = NormSpec(kind="layer", bias=True)
# What transformers calls them, and what the decoder does.
_ACTIVATIONS: Mapping[str, Activation] = MappingProxyType(
    {
        "silu": "silu",
        "swish": "silu",
        "gelu": "gelu",
        "gelu_new": "gelu_tanh",
        "gelu_fast": "gelu_tanh",
        "gelu_pytorch_tanh": "gelu_tanh",
        "quick_gelu": "quick_gelu",
        "relu": "relu",
        "relu2": "relu2",
    }
)


@final
@dataclass(frozen=True)
class Keys:
    """What a family's `config.json` calls what every decoder has."""

    hidden: str = "hidden_size"
    layers: str = "num_hidden_layers"
    heads: str = "num_attention_heads"
    groups: str = "num_key_value_heads"
    inner: str = "intermediate_size"
    positions: str = "max_position_embeddings"
    eps: str = "rms_norm_eps"
    activation: str = "hidden_act"


@final
@dataclass(frozen=True)
class Dense:
    """A `config.json` read as that of a dense decoder.

    Each property raises CheckpointError for a field that is of another type, out of range or
    missing, and UnsupportedError for what the decoder does not compute.

    Attributes:
        config: With the family's defaults under what the file says.
        keys: What its fields are called.
        kind: What its norms are, but for their eps.
    """

    config: Mapping[str, Any]
    keys: Keys = Keys()
    kind: NormSpec = _RMS_NORM

    @property
    def hidden(self) -> int:
        """Width of the residual stream."""
        return whole(self.config, self.keys.hidden)

    @property
    def heads(self) -> int:
        """Heads of queries."""
        return whole(self.config, self.keys.heads)

    @property
    def head_dim(self) -> int:
        """Width of a head: given, or what the heads leave of the residual stream."""
        return whole(self.config, "head_dim", max(1, self.hidden // self.heads))

    @property
    def positions(self) -> int:
        """The longest context that the model is meant for."""
        return whole(self.config, self.keys.positions, most=LARGEST_POSITION)

    @property
    def count(self) -> int:
        """How many layers there are."""
        return whole(self.config, self.keys.layers, most=_LAYERS)

    @property
    def norm(self) -> NormSpec:
        """The norm that all places share."""
        return replace(self.kind, eps=number(self.config, self.keys.eps, _EPSILON, most=1.0))

    @property
    def activation(self) -> Activation:
        """The activation between the matrices of a feed-forward layer."""
        name = word(self.config, self.keys.activation, "silu")
        if name not in _ACTIVATIONS:
            raise UnsupportedError(
                f"config.json gives {self.keys.activation} {shown(name)}; supported are "
                f"{', '.join(_ACTIVATIONS)}."
            )
        return _ACTIVATIONS[name]

    @property
    def attention(self) -> AttentionSpec:
        """Attention over the whole context, without biases, every head rotated as a whole."""
        return AttentionSpec(
            num_attention_heads=self.heads,
            num_key_value_heads=whole(self.config, self.keys.groups, self.heads),
            head_dim=self.head_dim,
            norm=self.norm,
        )

    @property
    def biased_attention(self) -> AttentionSpec:
        """The same, whose matrices have biases where `attention_bias` says so."""
        bias = flag(self.config, "attention_bias")
        return replace(self.attention, qkv_bias=bias, out_bias=bias)

    @property
    def mlp(self) -> MLPSpec:
        """A gated feed-forward layer without biases."""
        inner = whole(self.config, self.keys.inner)
        return MLPSpec(inner, norm=self.norm, activation=self.activation)

    @property
    def plain_mlp(self) -> MLPSpec:
        """A feed-forward layer of two matrices with biases, four times as wide where not told."""
        inner = whole(self.config, self.keys.inner, 4 * self.hidden)
        return MLPSpec(inner, self.norm, activation=self.activation, gated=False, bias=True)

    def rope_of(self, share: float) -> RopeSpec:
        """Return the rotary table of heads of which that share is rotated if nothing is said."""
        return rope_spec(self.config, self.head_dim, self.positions, share=share)

    @property
    def rope(self) -> RopeSpec:
        """The rotary table, where layers have one in common."""
        return rope_spec(self.config, self.head_dim, self.positions)

    def alike(self, layer: LayerSpec) -> DecoderSpec:
        """Return the decoder whose layers are all `layer`, with one rotary table."""
        return self.decoder(self.count * (layer,), (self.rope,))

    def decoder(self, layers: Sequence[LayerSpec], rotary: Sequence[RopeSpec]) -> DecoderSpec:
        """Return the decoder of these layers and those of the rotary tables that one turns by."""
        if table(self.config, "per_layer_config"):
            raise UnsupportedError(
                "config.json gives single layers settings of their own (per_layer_config); the "
                "layers of this family are all alike."
            )
        turned = {layer.mixer.rope for layer in layers} - {None}
        used = [index for index in range(len(rotary)) if index in turned]
        layers = [
            layer
            if layer.mixer.rope is None
            else replace(layer, mixer=replace(layer.mixer, rope=used.index(layer.mixer.rope)))
            for layer in layers
        ]
        return DecoderSpec(
            model_type=str(self.config["model_type"]),
            vocab_size=whole(self.config, "vocab_size"),
            hidden_size=self.hidden,
            max_position_embeddings=self.positions,
            layers=tuple(layers),
            norm=self.norm,
            rotary=tuple(rotary[index] for index in used),
            tie_word_embeddings=flag(self.config, "tie_word_embeddings"),
        )
