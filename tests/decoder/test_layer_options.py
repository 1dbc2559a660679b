"""Every option of a layer is what `transformers` computes, in every split and in one window.

Each case is a tiny random model of a kind that has the option, its weights under our names.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import pytest
import torch
import transformers
from torch import nn

from family_table import TABLE
from llm_coreml.decoder import Decoder, DecoderSpec
from llm_coreml.decoder.caches import RingCache
from llm_coreml.decoder.spec import (
    AttentionSpec,
    LayerSpec,
    MLPSpec,
    NormSpec,
    QKNormSpec,
    QueryGrowth,
    RopeSpec,
)
from llm_coreml.errors import CheckpointError
from llm_coreml.families import find_family
from tiny import BASE, expected_logits, llama, random_split, randomize, tokens_for

CONTEXT = 64
BOUND = 1e-4
NORM = NormSpec(1e-5)
HEADS = AttentionSpec(4, 2, 16, norm=NORM)
MLP = MLPSpec(80, norm=NORM)
SPLITS = ([CONTEXT], [1, 8, 3, 32, 1, 7, 12], [1] * CONTEXT)
Weights = dict[str, torch.Tensor]


def spec_of(*layers: LayerSpec, **options: Any) -> DecoderSpec:
    fixed: dict[str, Any] = {"rotary": (RopeSpec(16),), "norm": NORM, **options}
    return DecoderSpec("tiny", 97, 64, CONTEXT, layers, **fixed)


def model(kind: str, **changes: Any) -> Any:
    """Return a random model of a kind of `transformers`."""
    config = getattr(transformers, f"{kind.removesuffix('ForCausalLM')}Config")
    given = {**BASE, "num_hidden_layers": 2, **changes}
    return randomize(getattr(transformers, f"{kind}ForCausalLM")(config(**given)))


@dataclass(frozen=True)
class Case:
    """A reference, what it is as a spec, and how its weights become ours."""

    make: Callable[[], Any]
    spec: DecoderSpec
    adapt: Callable[[Weights], Weights] = lambda weights: weights


def gemma(weights: Weights) -> Weights:
    """Norms multiply by one more than their weight, and four of them surround the layer's parts."""
    names = {
        "post_attention_layernorm": "attention_out_norm",
        "pre_feedforward_layernorm": "post_attention_layernorm",
        "post_feedforward_layernorm": "mlp_out_norm",
    }
    return {
        renamed(name, names): weight + 1 if "norm" in name else weight
        for name, weight in weights.items()
    }


def olmo(weights: Weights) -> Weights:
    names = {
        "post_attention_layernorm": "attention_out_norm",
        "post_feedforward_layernorm": "mlp_out_norm",
    }
    return {renamed(name, names): weight for name, weight in weights.items()}


def renamed(name: str, names: Mapping[str, str]) -> str:
    return ".".join(names.get(part, part) for part in name.split("."))


def phi(weights: Weights) -> Weights:
    """Queries, keys and values are one matrix there, and so are gate and up."""
    fused = {
        "qkv_proj": (("q", 64), ("k", 32), ("v", 32)),
        "gate_up_proj": (("gate", 80), ("up", 80)),
    }
    found = {}
    for name, weight in weights.items():
        for part, pieces in fused.items():
            if f".{part}." in name:
                values = torch.split(weight, [size for _, size in pieces])
                for (kind, _), value in zip(pieces, values, strict=True):
                    found[name.replace(part, f"{kind}_proj")] = value
                break
        else:
            found[name] = weight
    return found


def windowed(window: int | None, rope: int = 0) -> LayerSpec:
    """Return a layer of Gemma 2 or 3."""
    attention = replace(HEADS, window=window, rope=rope, scale=1 / math.sqrt(24), out_norm=NORM)
    return LayerSpec(attention, replace(MLP, activation="gelu_tanh", out_norm=NORM))


def gemma_3() -> Case:
    ropes = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        "full_attention": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0},
    }
    local, full = windowed(12, rope=1), windowed(None)
    layers = [
        replace(layer, mixer=replace(layer.mixer, qk_norm=QKNormSpec(1e-5)))
        for layer in (local, full, local)
    ]
    spec = spec_of(
        *layers,
        rotary=(RopeSpec(16, 5000.0, "linear", 2.0), RopeSpec(16, 100.0)),
        embedding_multiplier=8.0,
    )
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    changes = {"head_dim": 16, "sliding_window": 12, "query_pre_attn_scalar": 24}

    def make() -> Any:
        config = transformers.Gemma3TextConfig(
            **{**BASE, **changes, "num_hidden_layers": 3, "layer_types": kinds},
            rope_parameters=ropes,
        )
        return randomize(transformers.Gemma3ForCausalLM(config))

    return Case(make, spec, gemma)


def hunyuan(weights: Weights) -> Weights:
    names = {"query_layernorm": "q_norm", "key_layernorm": "k_norm"}
    return {renamed(name, names): weight for name, weight in weights.items()}


def yarn(dim: int, theta: float) -> RopeSpec:
    """Return Ministral's table: scores as they were, since both scales are one."""
    return RopeSpec(dim, theta, "yarn", 16.0, original_max_position_embeddings=8)


def ministral() -> Case:
    parameters = {
        "rope_type": "yarn",
        "rope_theta": 1e6,
        "factor": 16.0,
        "original_max_position_embeddings": 8,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "llama_4_scaling_beta": 0.5,
    }
    grown = replace(HEADS, query_growth=QueryGrowth(0.5, 8))
    return Case(
        lambda: model("Ministral3", head_dim=16, pad_token_id=0, rope_parameters=parameters),
        spec_of(*2 * [LayerSpec(grown, MLP)], rotary=(yarn(16, 1e6),)),
    )


def afmoe(weights: Weights) -> Weights:
    names = {
        "post_attention_layernorm": "attention_out_norm",
        "pre_mlp_layernorm": "post_attention_layernorm",
        "post_mlp_layernorm": "mlp_out_norm",
    }
    return {renamed(name, names): weight for name, weight in weights.items()}


def gated_numbers() -> Case:
    kinds = ["sliding_attention", "full_attention"]
    layers = [
        LayerSpec(
            replace(
                HEADS, window=window, rope=rope, qk_norm=QKNormSpec(1e-5), gate="number",
                out_norm=NORM,
            ),
            replace(MLP, out_norm=NORM),
        )
        for window, rope in ((12, 0), (None, None))
    ]  # fmt: skip
    changes = {"head_dim": 16, "num_dense_layers": 2, "sliding_window": 12, "layer_types": kinds}
    return Case(lambda: model("Afmoe", **changes), spec_of(*layers), afmoe)


def lfm(weights: Weights) -> Weights:
    names = {
        "g_proj": "gate_proj",
        "operator_norm": "input_layernorm",
        "post_operator_norm": "attention_out_norm",
        "ffn_norm": "post_attention_layernorm",
        "post_ffn_norm": "mlp_out_norm",
        "feed_forward": "mlp",
        "w1": "gate_proj",
        "w3": "up_proj",
        "w2": "down_proj",
        "embedding_norm": "norm",
    }
    return {renamed(name, names): weight for name, weight in weights.items()}


def gated_heads() -> Case:
    attention = replace(HEADS, qk_norm=QKNormSpec(1e-5), gate="head", out_norm=NORM)
    layers = [
        LayerSpec(replace(attention, window=window, rope=rope), replace(MLP, out_norm=NORM))
        for window, rope in ((None, 0), (12, 1))
    ]
    tables = (RopeSpec(16, 1e6, "proportional", pairs=4), RopeSpec(16))
    changes = {
        "layer_types": ["full_attention", "sliding_attention"],
        "head_dim": 16,
        "sliding_window": 12,
        "norm_eps": 1e-5,
        "pad_token_id": 0,
    }
    return Case(lambda: model("Lfm3", **changes), spec_of(*layers, rotary=tables), lfm)


def sinks() -> Case:
    layers = [
        LayerSpec(replace(HEADS, window=window, rope=rope, scale=0.3, sinks=True), MLP)
        for window, rope in ((None, 0), (12, None))
    ]
    changes = {
        "attention_multiplier": 0.3,
        "layer_types": ["full_attention", "sliding_attention"],
        "layer_rope_theta": [10000.0, 0],
        "sliding_window": 12,
    }
    return Case(lambda: model("GraniteSWA", **changes), spec_of(*layers))


SLOPES = (0.5, 0.03125, 0.25, 0.3)


class Alibi(nn.Module):
    """Llama whose scores lose what distance takes, given to it as a mask."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, tokens: torch.Tensor, use_cache: bool) -> Any:
        positions = torch.arange(tokens.shape[1])
        ahead = positions - positions[:, None]
        mask = torch.tensor(SLOPES).view(1, -1, 1, 1) * ahead
        return self.inner(tokens, attention_mask=mask.masked_fill(ahead > 0, -torch.inf))


def alibi() -> Case:
    attention = replace(HEADS, alibi=SLOPES)
    # One with a window, and heads that are grouped in another way.
    layers = [LayerSpec(attention, MLP), LayerSpec(replace(attention, window=CONTEXT), MLP)]
    return Case(
        lambda: Alibi(llama(num_hidden_layers=2)),
        spec_of(*layers),
        lambda weights: {n.removeprefix("inner.model.").removeprefix("inner."): w
                         for n, w in weights.items()},
    )  # fmt: skip


CASES: dict[str, Case] = {
    "window": Case(
        lambda: model("Mistral", sliding_window=9),
        spec_of(*2 * [LayerSpec(replace(HEADS, window=9), MLP)]),
    ),
    "biases of queries, keys and values only": Case(
        lambda: model("Qwen2"), spec_of(*2 * [LayerSpec(replace(HEADS, qkv_bias=True), MLP)])
    ),
    "norms of each query and key": Case(
        lambda: model("Qwen3", head_dim=16),
        spec_of(*2 * [LayerSpec(replace(HEADS, qk_norm=QKNormSpec(1e-5)), MLP)]),
    ),
    "multipliers": Case(
        lambda: model(
            "Granite",
            embedding_multiplier=3.0,
            residual_multiplier=0.6,
            attention_multiplier=0.4,
            logits_scaling=0.25,
        ),
        spec_of(
            *2 * [LayerSpec(replace(HEADS, scale=0.4), MLP)],
            embedding_multiplier=3.0,
            residual_multiplier=0.6,
            logits_multiplier=4.0,
        ),
    ),
    "a layer without rotary embedding": Case(
        lambda: model("SmolLM3", no_rope_layers=[1, 0], pad_token_id=0),
        spec_of(
            LayerSpec(HEADS, MLP),
            LayerSpec(replace(HEADS, rope=None), MLP),
            rotary=(RopeSpec(16, 2000000.0),),
        ),
    ),
    "norms behind only": Case(
        lambda: model("Olmo2"),
        spec_of(
            *2
            * [
                LayerSpec(
                    replace(HEADS, norm=None, out_norm=NORM, qk_norm=QKNormSpec(1e-5, over="all")),
                    replace(MLP, norm=None, out_norm=NORM),
                )
            ]
        ),
        olmo,
    ),
    "a plain MLP": Case(
        lambda: model("Arcee"),
        spec_of(*2 * [LayerSpec(HEADS, replace(MLP, gated=False, activation="relu2"))]),
    ),
    "half of each head rotated": Case(
        lambda: model(
            "Phi3",
            pad_token_id=0,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.5,
            },
        ),
        spec_of(*2 * [LayerSpec(HEADS, MLP)], rotary=(RopeSpec(8),)),
        phi,
    ),
    "windows in turn, caps, norms on both sides": Case(
        lambda: model(
            "Gemma2",
            head_dim=16,
            sliding_window=12,
            query_pre_attn_scalar=24,
            attn_logit_softcapping=2.0,
            final_logit_softcapping=3.0,
        ),
        spec_of(
            *(
                replace(layer, mixer=replace(layer.mixer, softcap=2.0))
                for layer in (windowed(12), windowed(None))
            ),
            embedding_multiplier=8.0,
            logits_softcap=3.0,
        ),
        gemma,
    ),
    "two rotary tables": gemma_3(),
    "norms behind the rotation": Case(
        lambda: model("HunYuanDenseV1", head_dim=16, pad_token_id=0),
        spec_of(*2 * [LayerSpec(replace(HEADS, qk_norm=QKNormSpec(1e-5, rotated=True)), MLP)]),
        hunyuan,
    ),
    "queries that grow": ministral(),
    "gates of numbers": gated_numbers(),
    "gates of heads": gated_heads(),
    "sinks": sinks(),
    "distances": alibi(),
}


def gemma_4(**changes: Any) -> Case:
    """Layers that share keys and values, heads of two sizes, parts of a second table."""
    entry = TABLE["gemma4_text"]
    config = {"model_type": "gemma4_text", **entry.sizes, **changes}
    family = find_family(config)
    spec = family.spec(config)
    ours = {made.names[0]: name for name, made in family.stored(spec).items()}

    def adapt(weights: Weights) -> Weights:
        return {ours.get(f"model.{name}", name): weight for name, weight in weights.items()}

    def make() -> Any:
        theirs = transformers.Gemma4TextConfig(**config, attn_implementation="eager")
        model = randomize(transformers.Gemma4ForCausalLM(theirs), std=0.1)
        for layer in model.model.layers:
            layer.layer_scalar.fill_(0.8)
            # Scores are not divided: of these alone a softmax would make its errors of fp32 large.
            layer.self_attn.q_norm.weight.data.mul_(0.25)
        return model

    return Case(make, replace(spec, max_position_embeddings=CONTEXT), adapt)


CASES["shared keys and values, and a second table"] = gemma_4(
    num_kv_shared_layers=3, use_double_wide_mlp=True, tie_word_embeddings=False
)
CASES["keys that are values, in part shared"] = gemma_4(
    attention_k_eq_v=True, num_kv_shared_layers=2, num_global_key_value_heads=1
)


def fitted(
    spec: DecoderSpec,
    weights: Weights,
    form: Literal["fused", "decomposed"],
    longest: int | None = None,
) -> Decoder:
    """Return a decoder that holds all of `weights`, by name, and nothing else."""
    decoder = Decoder(spec, CONTEXT, form, "all", longest=longest)
    left = dict(weights)
    for name, _ in list(decoder.named_parameters()):
        owner, _, attribute = name.rpartition(".")
        parameter = nn.Parameter(left.pop(name), requires_grad=False)
        setattr(decoder.get_submodule(owner), attribute, parameter)
    assert not left
    return decoder.eval()


def weights_of(case: Case, reference: Any) -> Weights:
    found = {name.removeprefix("model."): w for name, w in reference.state_dict().items()}
    return case.adapt(found)


def read(decoder: Decoder, tokens: list[int], parts: list[int]) -> torch.Tensor:
    rows, start = [], 0
    decoder.reset()
    with torch.inference_mode():
        for length in parts:
            chunk = torch.tensor([tokens[start : start + length]])
            rows.append(decoder(chunk, torch.tensor([start]))[0])
            start += length
    return torch.cat(rows)


@pytest.mark.parametrize("form", ["fused", "decomposed"])
@pytest.mark.parametrize("name", CASES)
def test_an_option_in_every_split(name: str, form: Literal["fused", "decomposed"]) -> None:
    case, tokens = CASES[name], tokens_for(97, CONTEXT)
    reference = case.make()
    expected = expected_logits(reference, tokens)
    assert expected.abs().max() > 1, "tiny logits would hide differences"
    decoder = fitted(case.spec, weights_of(case, reference), form)
    for parts in SPLITS:
        error = (read(decoder, tokens, parts) - expected).abs().max()
        assert error < BOUND, f"{parts}: {error}"


@pytest.mark.parametrize("longest", [1, 4, 15])
@pytest.mark.parametrize(
    "name", [name for name, case in CASES.items() if "window" in name] + ["two rotary tables"]
)
def test_layers_with_windows_remember_a_ring(name: str, longest: int) -> None:
    case, tokens = CASES[name], tokens_for(97, CONTEXT)
    reference = case.make()
    expected = expected_logits(reference, tokens)
    decoder = fitted(case.spec, weights_of(case, reference), "fused", longest)
    rings = [s for s in decoder.states.values() if isinstance(s, RingCache)]
    assert [ring.ring for ring in rings] == [32]
    assert sum(len(list(state.buffers())) for state in decoder.states.values()) == 2
    for parts in (*SPLITS, *(random_split(CONTEXT, range(1, longest + 1), s) for s in range(4))):
        error = (read(decoder, tokens, parts) - expected).abs().max()
        assert error < BOUND, f"{parts}: {error}"


@pytest.mark.parametrize("name", CASES)
@torch.inference_mode()
def test_a_window_on_its_own_is_read_by_steps_that_show_what_each_matrix_gets(name: str) -> None:
    case, tokens = CASES[name], tokens_for(97, 40)
    reference = case.make()
    decoder = fitted(case.spec, weights_of(case, reference), "fused")
    linears = {n: m for n, m in decoder.layers.named_modules() if isinstance(m, nn.Linear)}
    seen: dict[str, torch.Tensor] = {}
    for inner, module in linears.items():
        module.register_forward_pre_hook(
            lambda _, given, inner=inner: seen.__setitem__(inner, given[0])
        )
    x, chunk = decoder.embed(torch.tensor([tokens])), decoder.window(40)
    told: dict[str, torch.Tensor] = {}
    for index in range(len(case.spec.layers)):
        block = decoder.block(index)
        steps = block.steps(x, chunk)
        inputs = next(steps)()
        for stage in block.wiring.shared:
            told.update({f"{index}.{inner}": inputs for inner in stage})
            try:
                inputs = steps.send(inputs)()
            except StopIteration as done:
                x = done.value
    assert told.keys() == seen.keys() == linears.keys()
    assert all(torch.equal(told[inner], seen[inner]) for inner in told)
    assert (decoder.head(x)[0] - expected_logits(reference, tokens)).abs().max() < BOUND
    assert not any(buffer.any() for s in decoder.states.values() for buffer in s.buffers())


def test_layers_of_several_sizes_have_several_caches() -> None:
    """Each layer as `transformers` computes it in a model of its own."""
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    changes = ({}, {"num_key_value_heads": 1, "intermediate_size": 48}, {}, {"head_dim": 8})
    whole = llama(num_hidden_layers=4)
    weights = weights_of(CASES["window"], whole)
    layers = []
    for index, change in enumerate(changes):
        if change:
            part = llama(num_hidden_layers=4, **change)
            whole.model.layers[index] = part.model.layers[index]
            assert isinstance(part.model.layers[index], LlamaDecoderLayer)
            prefix = f"layers.{index}."
            theirs = weights_of(CASES["window"], part)
            weights.update({n: w for n, w in theirs.items() if n.startswith(prefix)})
        heads = replace(
            HEADS,
            num_key_value_heads=change.get("num_key_value_heads", 2),
            head_dim=change.get("head_dim", 16),
            rope=None,
        )
        inner = replace(MLP, intermediate_size=change.get("intermediate_size", 80))
        layers.append(LayerSpec(heads, inner))
    spec = spec_of(*layers, rotary=())
    decoder = fitted(spec, weights, "fused")
    shapes = {n: {tuple(b.shape) for b in s.buffers()} for n, s in decoder.states.items()}
    assert shapes == {
        "cache": {(2, 4, CONTEXT, 16)},
        "cache_1": {(1, 2, CONTEXT, 16)},
        "cache_2": {(1, 4, CONTEXT, 8)},
    }
    tokens = tokens_for(97, CONTEXT)
    expected = unrotated(whole, tokens)
    for parts in SPLITS:
        assert (read(decoder, tokens, parts) - expected).abs().max() < BOUND


def unrotated(whole: Any, tokens: list[int]) -> torch.Tensor:
    """Return what layers of `transformers` give whose tables turn nothing, whatever their size."""
    mask = torch.full((CONTEXT, CONTEXT), -torch.inf).triu(1)[None, None]
    with torch.inference_mode():
        x = whole.model.embed_tokens(torch.tensor([tokens]))
        for layer in whole.model.layers:
            ones = torch.ones(1, CONTEXT, layer.self_attn.head_dim)
            x = layer(x, attention_mask=mask, position_embeddings=(ones, 0 * ones))
        logits: torch.Tensor = whole.lm_head(whole.model.norm(x))[0]
    return logits


def test_sizes_that_contradict_each_other_are_named() -> None:
    with pytest.raises(CheckpointError, match="has 16 numbers of each head rotated"):
        spec_of(LayerSpec(replace(HEADS, head_dim=8), MLP))
    with pytest.raises(CheckpointError, match="num_hidden_layers = 0"):
        spec_of()
