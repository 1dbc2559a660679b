"""InternLM 3: a Llama whose biases have names of their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llm_coreml.decoder.spec import DecoderSpec
from llm_coreml.errors import UnsupportedError
from llm_coreml.families import llama
from llm_coreml.families.family import Family
from llm_coreml.families.fields import flag
from llm_coreml.families.names import stored

# transformers' own defaults where config.json is silent.
_DEFAULTS = {
    "vocab_size": 128512,
    "hidden_size": 4096,
    "intermediate_size": 10240,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
}
_BIASES = {"qkv_bias": "attention_bias", "bias": "mlp_bias"}


def spec(config: Mapping[str, Any]) -> DecoderSpec:
    """Read an InternLM 3 `config.json`.

    Raises:
        CheckpointError: see `llama.spec`.
        UnsupportedError: see `llama.spec`; or biases in some matrices alone.
    """
    known = {**_DEFAULTS, **config}
    for name, ours in _BIASES.items():
        known[ours] = flag(known, ours) or flag(known, name)
    if known["attention_bias"] != known["mlp_bias"]:
        raise UnsupportedError(
            "config.json gives qkv_bias and bias different values, which transformers does not "
            "read either. Give an InternLM 3 that has both or neither."
        )
    return llama.spec(known)


FAMILY = Family(spec, stored, llama.notes, ignored=llama.FAMILY.ignored)
