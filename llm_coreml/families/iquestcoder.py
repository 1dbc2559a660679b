"""IQuest-Coder: a Llama under another name."""

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
    "vocab_size": 76800,
    "hidden_size": 5120,
    "intermediate_size": 27648,
    "num_hidden_layers": 80,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
}


def spec(config: Mapping[str, Any]) -> DecoderSpec:
    """Read an IQuest-Coder `config.json`.

    Raises:
        CheckpointError: see `llama.spec`.
        UnsupportedError: see `llama.spec`; or an option that no published model has.
    """
    if config.get("clip_qkv") is not None or flag(config, "use_sliding_window"):
        raise UnsupportedError(
            "config.json asks for clip_qkv or use_sliding_window, which transformers does not "
            "compute of this family either. Give a published IQuest-Coder."
        )
    return llama.spec({**_DEFAULTS, **config})


FAMILY = Family(spec, stored, llama.notes, ignored=llama.FAMILY.ignored)
