"""StarCoder 2: LayerNorm, plain MLPs and biases; a window where one is given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llm_coreml.decoder.spec import DecoderSpec, LayerSpec
from llm_coreml.families import llama
from llm_coreml.families.dense import LAYER_NORM, Dense, Keys
from llm_coreml.families.family import Family
from llm_coreml.families.fields import flag
from llm_coreml.families.names import Names, stored
from llm_coreml.families.rotary import rope_notes
from llm_coreml.families.windows import sliding_window

# transformers' own defaults where config.json is silent.
_DEFAULTS = {
    "vocab_size": 49152,
    "hidden_size": 3072,
    "intermediate_size": 12288,
    "num_hidden_layers": 30,
    "num_attention_heads": 24,
    "num_key_value_heads": 2,
    "hidden_act": "gelu_pytorch_tanh",
    "max_position_embeddings": 4096,
    "norm_epsilon": 1e-5,
    "use_bias": True,
    "tie_word_embeddings": True,
}
_NAMES = Names(modules={"mlp.up_proj": "mlp.c_fc", "mlp.down_proj": "mlp.c_proj"})


def spec(config: Mapping[str, Any]) -> DecoderSpec:
    """Read a StarCoder 2 `config.json`.

    Raises:
        CheckpointError: see `llama.spec`.
        UnsupportedError: see `llama.spec`.
    """
    read = Dense({**_DEFAULTS, **config}, Keys(eps="norm_epsilon"), LAYER_NORM)
    bias = flag(read.config, "use_bias")
    attention = replace(read.attention, qkv_bias=bias, out_bias=bias, window=sliding_window(config))
    return read.alike(LayerSpec(attention, replace(read.plain_mlp, bias=bias)))


FAMILY = Family(spec, lambda spec: stored(spec, _NAMES), rope_notes, ignored=llama.FAMILY.ignored)
