"""What a decoder is, as data: sizes, norms, rotary embedding.

A family turns its `config.json` into a `DecoderSpec`; nothing below this line knows
the name of a family. New architectures add fields here, not branches in callers.

    spec = DecoderSpec(vocab_size=32000, hidden_size=2048, ...)
    spec.num_queries_per_kv
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llm_coreml.errors import CheckpointError

RopeKind = Literal["default", "linear", "dynamic", "llama3"]


@dataclass(frozen=True)
class RopeSpec:
    """Rotary position embedding: the base, and how positions past training are scaled.

    Attributes:
        theta: Base of the geometric series of frequencies.
        kind: `default`, `linear` (all frequencies divided by `factor`), `dynamic` (unscaled
            inside `original_max_position_embeddings`) or `llama3` (low frequencies divided).
        factor: Scale of `linear` and `llama3`.
        low_freq_factor: `llama3`: wavelengths above context / this are divided by `factor`.
        high_freq_factor: `llama3`: wavelengths below context / this stay as they are.
        original_max_position_embeddings: The context that the model was first trained on.
    """

    theta: float = 10000.0
    kind: RopeKind = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 0


@dataclass(frozen=True)
class DecoderSpec:
    """Everything that fixes the decoder's graph and the shapes of its tensors.

    Raises:
        CheckpointError: a size is not positive, or two sizes contradict each other.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-5
    rope: RopeSpec = RopeSpec()
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False

    def __post_init__(self) -> None:
        sizes = (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "max_position_embeddings",
        )
        for name in sizes:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise CheckpointError(
                    f"config.json gives {name} = {value!r}; it must be a positive whole number."
                )
        if self.num_attention_heads % self.num_key_value_heads:
            raise CheckpointError(
                f"config.json gives {self.num_attention_heads} attention heads and "
                f"{self.num_key_value_heads} key/value heads; the first must be a multiple "
                "of the second."
            )
        if self.head_dim % 2:
            raise CheckpointError(
                f"config.json gives head_dim = {self.head_dim}; rotary embeddings need an even one."
            )

    @property
    def num_queries_per_kv(self) -> int:
        """Query heads that share one key/value head (1 for plain multi-head attention)."""
        return self.num_attention_heads // self.num_key_value_heads
