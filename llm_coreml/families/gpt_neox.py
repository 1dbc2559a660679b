"""GPT-NeoX and Pythia: attention and a plain MLP side by side, behind a norm each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llm_coreml.decoder.spec import DecoderSpec, LayerSpec
from llm_coreml.families.arrangements import FOUR_TIMES, qkv_blocks
from llm_coreml.families.dense import LAYER_NORM, Dense, Keys
from llm_coreml.families.family import Family
from llm_coreml.families.fields import flag, number
from llm_coreml.families.names import Names, stored
from llm_coreml.families.rotary import rope_notes

# transformers' own defaults where config.json is silent.
_DEFAULTS = {
    "vocab_size": 50432,
    "hidden_size": 6144,
    "intermediate_size": 24576,
    "num_hidden_layers": 44,
    "num_attention_heads": 64,
    "hidden_act": "gelu",
    "max_position_embeddings": 2048,
    "layer_norm_eps": 1e-5,
    "attention_bias": True,
    "use_parallel_residual": True,
}
NAMES = Names(
    trunk="gpt_neox.",
    head="embed_out",
    modules={
        "embed_tokens": "embed_in",
        "norm": "final_layer_norm",
        **{f"self_attn.{kind}_proj": "attention.query_key_value" for kind in "qkv"},
        "self_attn.o_proj": "attention.dense",
        **FOUR_TIMES,
    },
    values=lambda spec, layer: qkv_blocks(layer),
)


def spec(config: Mapping[str, Any]) -> DecoderSpec:
    """Read a GPT-NeoX `config.json`; old ones say `rotary_pct` and `rotary_emb_base`.

    Raises:
        CheckpointError: see `llama.spec`.
        UnsupportedError: see `llama.spec`.
    """
    known = {**_DEFAULTS, **config}
    # transformers reads no other names of the two, unless among the parameters of RoPE.
    known["partial_rotary_factor"] = number(config, "rotary_pct", 0.25, most=1.0)
    known["rope_theta"] = number(config, "rotary_emb_base", 10000.0)
    read = Dense(known, Keys(groups="num_attention_heads", eps="layer_norm_eps"), LAYER_NORM)
    layer = LayerSpec(read.biased_attention, read.plain_mlp, flag(known, "use_parallel_residual"))
    return read.decoder(read.count * (layer,), (read.rope_of(0.25),))


FAMILY = Family(
    spec,
    lambda spec: stored(spec, NAMES),
    rope_notes,
    # Old checkpoints store masks and frequencies.
    ignored=("*.rotary_emb.inv_freq", "*.attention.bias", "*.attention.masked_bias"),
    other_names=(lambda spec: stored(spec, replace(NAMES, head="lm_head")),),
)
