"""How llama.cpp stores each architecture: names of tensors, sizes, and what it takes for granted.

    known = ARCHITECTURES["gemma3"]
    known.model_type                       # 'gemma3_text'
    known.name("blk.0.ffn_norm.weight")    # 'model.layers.0.pre_feedforward_layernorm.weight'

What a file says in metadata stands in `numbers`; what llama.cpp has in its code instead of in the
file (which layers have a window, which activation) is in `fixed`, `pattern` and `no_rope`. Its
converter puts rows of queries and keys in another order where its rotation asks for that (`rows`),
and stores gains that are trained as a difference from one as they are used (`plus_one`).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal, final

# `pairs`: each head's rotated halves interleaved; `heads`: queries, keys and values one after the
# other, where transformers has them head by head; `groups`: the same, by groups of heads.
Rows = Literal["own", "pairs", "heads", "groups"]

_LAYER = re.compile(r"blk\.(\d+)\.(\w+)")
_TOP = {
    "token_embd": "embed_tokens",
    "token_embd_norm": "embed_norm",
    "position_embd": "embed_positions",
    "output_norm": "norm",
    "per_layer_token_embd": "embed_tokens_per_layer",
    "per_layer_model_proj": "per_layer_model_projection",
    "per_layer_proj_norm": "per_layer_projection_norm",
}
_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_SANDWICH = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_AFTER = {
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_FALCON = {
    "token_embd": "word_embeddings",
    "output_norm": "ln_f",
    "attn_qkv": "self_attention.query_key_value",
    "attn_output": "self_attention.dense",
    "ffn_up": "mlp.dense_h_to_4h",
    "ffn_down": "mlp.dense_4h_to_h",
}
_NEOX = {
    **_FALCON,
    "token_embd": "embed_in",
    "output_norm": "final_layer_norm",
    "attn_qkv": "attention.query_key_value",
    "attn_output": "attention.dense",
}
_SECOND = "attn_norm_2"
_BIGCODE = {
    "token_embd": "wte",
    "position_embd": "wpe",
    "output_norm": "ln_f",
    "attn_norm": "ln_1",
    "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj",
    "ffn_norm": "ln_2",
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
}
_BIGCODE_SIZES = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "intermediate_size": "n_inner",
    "max_position_embeddings": "n_positions",
}
# Its matrices are the other way round in files of transformers, which tells the two apart.
_TURNED = ("attn_qkv", "attn_output", "ffn_up", "ffn_down")
_GPT2 = {**_BIGCODE, **{name: f"{_BIGCODE[name]}.T" for name in _TURNED}}
_BLOOM_SIZES = {
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "intermediate_size": "n_inner",
    "max_position_embeddings": "seq_length",
}
_RMS = {"attention.layer_norm_rms_epsilon": "rms_norm_eps"}
_WINDOW = {"attention.sliding_window": "sliding_window"}


@final
@dataclass(frozen=True)
class Architecture:
    """One architecture of llama.cpp, as a model of `transformers`.

    Attributes:
        model_type: What it is there.
        names: Modules of a layer, and of the whole, by their names in a file; beyond the usual.
        front: What stands before all names but the head's.
        layer: What stands before the number of a layer.
        head: The head's name.
        eps: The metadata's name of the norms' eps, and what `config.json` calls it.
        settings: What `config.json` calls other numbers of the metadata; beyond the usual sizes.
        fixed: What every model of it has.
        share: What `config.json` calls the share of a head that is rotated; None where all is.
        pattern: Every how manieth layer sees all positions, where a window is given.
        no_rope: Every how manieth layer has no rotary embedding.
        rows: How the rows of queries and keys are stored.
        plus_one: Gains of norms are stored as they are used, one more than they are trained.
        wide_up: `ffn_up` holds the gate, too.
        biases: What `config.json` calls the biases of attention, of its output, of the rest.
        second: Other names of modules where layers have a second norm before attention.
        sizes: What `config.json` calls sizes, by their usual names.
        rotary: There are rotary embeddings.
        alone: Tensors of a layer that are no module's, by their whole names in a file.
        kept: Parameters of a layer that a file has as a number for each layer in its metadata, by
            the names of these.
    """

    model_type: str
    names: Mapping[str, str] = field(default_factory=dict)
    front: str = "model."
    layer: str = "layers."
    head: str = "lm_head"
    eps: Mapping[str, str] = field(default_factory=lambda: _RMS)
    settings: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    share: str | None = None
    pattern: int | None = None
    no_rope: int | None = None
    rows: Rows = "own"
    plus_one: bool = False
    wide_up: bool = False
    biases: tuple[str | None, str | None, str | None] = ("attention_bias", None, "mlp_bias")
    second: Mapping[str, str] = field(default_factory=dict)
    sizes: Mapping[str, str] = field(default_factory=dict)
    rotary: bool = True
    alone: Mapping[str, str] = field(default_factory=dict)
    kept: Mapping[str, str] = field(default_factory=dict)

    @property
    def numbers(self) -> Mapping[str, str]:
        """What `config.json` calls numbers of the metadata, the norms' eps among them."""
        return {**self.eps, **self.settings}

    def of(self, tensors: Collection[str]) -> Architecture:
        """Return what it is in a file of these tensors."""
        if not self.second or f"blk.0.{_SECOND}.weight" not in tensors:
            return self
        return replace(self, names={**self.names, **self.second})

    def name(self, stored: str) -> str:
        """Return the name that `transformers` has for a tensor; one that is not known keeps its."""
        module, _, suffix = stored.rpartition(".")
        if module == "output":
            return f"{self.head}.{suffix}"
        top = {**_TOP, **self.names}
        if module in _TOP:
            return f"{self.front}{top[module]}.{suffix}"
        found = _LAYER.fullmatch(module)
        if found and f"{found[2]}.{suffix}" in self.alone:
            return self.of_layer(int(found[1]), self.alone[f"{found[2]}.{suffix}"])
        inner = {**_NAMES, **self.names}
        if found and found[2] in inner:
            return self.of_layer(int(found[1]), f"{inner[found[2]]}.{suffix}")
        return stored

    def of_layer(self, index: int, name: str) -> str:
        """Return the whole name of what a layer has."""
        return f"{self.front}{self.layer}{index}.{name}"


def _eps(name: str) -> dict[str, str]:
    return {"attention.layer_norm_epsilon": name}


_CAPS = {
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
_GEMMA_2 = Architecture(
    "gemma2",
    names=_SANDWICH,
    settings={**_WINDOW, **_CAPS},
    fixed={"hidden_activation": "gelu_pytorch_tanh"},
    pattern=2,
    plus_one=True,
)
_BIASES = (None, None, "use_bias")

ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {
        "apertus": Architecture(
            "apertus",
            names={"attn_norm": "attention_layernorm", "ffn_norm": "feedforward_layernorm"},
            fixed={"hidden_act": "xielu"},
            kept={
                f"xielu.{name}": f"mlp.act_fn.{name}"
                for name in ("alpha_p", "alpha_n", "beta", "eps")
            },
        ),
        "arcee": Architecture("arcee", rows="pairs"),
        "bloom": Architecture(
            "bloom",
            names={**_FALCON, "token_embd_norm": "word_embeddings_layernorm"},
            front="transformer.",
            layer="h.",
            eps=_eps("layer_norm_epsilon"),
            rows="heads",
            biases=(None, None, None),
            sizes=_BLOOM_SIZES,
            rotary=False,
        ),
        "chatglm": Architecture(
            "glm",
            names={"ffn_up": "mlp.gate_up_proj"},
            share="partial_rotary_factor",
            wide_up=True,
        ),
        "cohere2": Architecture(
            "cohere2",
            eps=_eps("layer_norm_eps"),
            settings={"logit_scale": "logit_scale", **_WINDOW},
            pattern=4,
        ),
        "command-r": Architecture(
            "cohere", eps=_eps("layer_norm_eps"), settings={"logit_scale": "logit_scale"}
        ),
        "ernie4_5": Architecture("ernie4_5", biases=_BIASES),
        "exaone4": Architecture("exaone4", names=_AFTER, settings=_WINDOW, pattern=4),
        "falcon": Architecture(
            "falcon",
            names=_FALCON,
            second={"attn_norm": "ln_mlp", _SECOND: "ln_attn"},
            front="transformer.",
            layer="h.",
            eps=_eps("layer_norm_epsilon"),
            settings={"attention.head_count_kv": "num_kv_heads"},
            fixed={"alibi": False, "parallel_attn": True},
            rows="groups",
            biases=(None, None, "bias"),
        ),
        "gemma": Architecture("gemma", fixed={"hidden_act": "gelu_pytorch_tanh"}, plus_one=True),
        "gemma2": _GEMMA_2,
        "gemma3": replace(_GEMMA_2, model_type="gemma3_text", pattern=6),
        "gemma4": Architecture(
            "gemma4_text",
            names={
                **_SANDWICH,
                "inp_gate": "per_layer_input_gate",
                "proj": "per_layer_projection",
                "post_norm": "post_per_layer_input_norm",
            },
            settings={
                **_WINDOW,
                "final_logit_softcapping": "final_logit_softcapping",
                "attention.shared_kv_layers": "num_kv_shared_layers",
                "embedding_length_per_layer_input": "hidden_size_per_layer_input",
            },
            fixed={"hidden_activation": "gelu_pytorch_tanh"},
            alone={"layer_output_scale.weight": "layer_scalar"},
        ),
        "glm4": Architecture(
            "glm4",
            names={
                "post_attention_norm": "post_self_attn_layernorm",
                "post_ffw_norm": "post_mlp_layernorm",
                "ffn_up": "mlp.gate_up_proj",
            },
            share="partial_rotary_factor",
            wide_up=True,
        ),
        "gpt2": Architecture(
            "gpt2",
            names=_GPT2,
            front="transformer.",
            layer="h.",
            eps=_eps("layer_norm_epsilon"),
            fixed={"activation_function": "gelu_new"},
            biases=(None, None, None),
            sizes=_BIGCODE_SIZES,
            rotary=False,
        ),
        "gptneox": Architecture(
            "gpt_neox",
            names=_NEOX,
            front="gpt_neox.",
            head="embed_out",
            eps=_eps("layer_norm_eps"),
            settings={"use_parallel_residual": "use_parallel_residual"},
            fixed={"hidden_act": "gelu"},
            share="rotary_pct",
            rows="heads",
        ),
        "granite": Architecture(
            "granite",
            settings={
                "attention.scale": "attention_multiplier",
                "embedding_scale": "embedding_multiplier",
                "residual_scale": "residual_multiplier",
                "logit_scale": "logits_scaling",
            },
            rows="pairs",
        ),
        "hunyuan-dense": Architecture(
            "hunyuan_v1_dense",
            names={
                "attn_q_norm": "self_attn.query_layernorm",
                "attn_k_norm": "self_attn.key_layernorm",
            },
        ),
        "llama": Architecture("llama", settings=_WINDOW, rows="pairs"),
        "mistral3": Architecture(
            "ministral3", settings={**_WINDOW, "attention.temperature_scale": ""}, rows="pairs"
        ),
        "nemotron": Architecture(
            "nemotron",
            eps=_eps("norm_eps"),
            fixed={"hidden_act": "relu2"},
            share="partial_rotary_factor",
            plus_one=True,
        ),
        "olmo": Architecture(
            "olmo",
            eps={},  # always 1e-5
            settings={"attention.clamp_kqv": "clip_qkv"},
            rows="pairs",
        ),
        "olmo2": Architecture("olmo2", names=_AFTER, settings=_WINDOW, pattern=4),
        "phi2": Architecture(
            "phi",
            names={
                "output_norm": "final_layernorm",
                "attn_output": "self_attn.dense",
                "ffn_up": "mlp.fc1",
                "ffn_down": "mlp.fc2",
            },
            eps=_eps("layer_norm_eps"),
            fixed={"hidden_act": "gelu_new"},
            share="partial_rotary_factor",
        ),
        "phi3": Architecture(
            "phi3",
            names={"ffn_up": "mlp.gate_up_proj"},
            settings={
                **_WINDOW,
                "rope.scaling.original_context_length": "original_max_position_embeddings",
            },
            share="partial_rotary_factor",
            wide_up=True,
        ),
        "qwen2": Architecture("qwen2"),
        "qwen3": Architecture("qwen3"),
        "seed_oss": Architecture(
            "seed_oss",
            names={"post_attention_norm": "post_attention_layernorm"},
            biases=("attention_bias", "attention_out_bias", "mlp_bias"),
        ),
        "smollm3": Architecture("smollm3", no_rope=4, rows="pairs"),
        "stablelm": Architecture(
            "stablelm",
            eps=_eps("layer_norm_eps"),
            settings={"use_parallel_residual": "use_parallel_residual"},
            share="partial_rotary_factor",
            biases=("use_qkv_bias", None, None),
        ),
        "starcoder": Architecture(
            "gpt_bigcode",
            names=_BIGCODE,
            front="transformer.",
            layer="h.",
            eps=_eps("layer_norm_epsilon"),
            fixed={"activation_function": "gelu_pytorch_tanh", "multi_query": True},
            biases=(None, None, None),
            sizes=_BIGCODE_SIZES,
            rotary=False,
        ),
        "starcoder2": Architecture(
            "starcoder2",
            names={"ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"},
            eps=_eps("norm_epsilon"),
            fixed={"hidden_act": "gelu_pytorch_tanh", "sliding_window": None},
            biases=_BIASES,
        ),
    }
)
