"""The reading of `config.json`, judged: each spelling means what `transformers` makes of it.

Verification holds an artifact against our own reading, so a wrong one would pass there. Here the
file is the only thing that both sides share: `transformers` builds its model from it, and tables,
options and logits are compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatch
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch

from cases import cases
from family_table import ABSENT, SIZES, TABLE, Entry, checkpoint, their_model, write_config
from llm_coreml.checkpoint.weights_view import Stored, expected_tensors
from llm_coreml.decoder import Decoder, DecoderSpec, skeleton
from llm_coreml.decoder.norm import RMSNorm
from llm_coreml.decoder.rope import rope_tables
from llm_coreml.families import Family, find_family
from llm_coreml.families.rotary import rope_kind, rope_values
from llm_coreml.model import Model, open_model
from llm_coreml.quantize.fill import fill
from tiny import expected_logits, tokens_for

CONTEXT = 96
LINEAR = {"rope_type": "linear", "factor": 4.0}
BANDS = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 = {"rope_type": "llama3", **BANDS, "original_max_position_embeddings": 32}
DEFAULT = {"rope_type": "default", "rope_theta": 500.0}
YARN = {"factor": 4.0, "original_max_position_embeddings": 32}
LONGROPE = {
    "factor": 4.0,
    "short_factor": [1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0],
    "long_factor": [1.0, 3.0, 5.0, 7.0, 9.0, 11.0, 13.0, 15.0],
    "original_max_position_embeddings": 32,
}
SPELLINGS: dict[str, dict[str, Any]] = {
    "silent": {},
    # RoPE, before transformers 5
    "theta": {"rope_theta": 500.0},
    "whole theta": {"rope_theta": 500},
    "null scaling": {"rope_theta": 500.0, "rope_scaling": None},
    "empty scaling": {"rope_theta": 500.0, "rope_scaling": {}},
    "linear by type": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "linear by rope_type": {"rope_theta": 500.0, "rope_scaling": LINEAR},
    "linear, whole factor": {"rope_scaling": {"type": "linear", "factor": 4}},
    "type and rope_type": {"rope_scaling": {**LINEAR, "type": "dynamic"}},
    "rope_type linear, type default": {"rope_scaling": {**LINEAR, "type": "default"}},
    "theta inside scaling": {"rope_theta": 7000.0, "rope_scaling": {**LINEAR, "rope_theta": 500.0}},
    "dynamic": {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
    "dynamic, trained length": {
        "rope_scaling": {
            "type": "dynamic",
            "factor": 2.0,
            "original_max_position_embeddings": 32,
        }
    },
    "llama3": {"rope_theta": 500.0, "rope_scaling": LLAMA3},
    "llama3, no trained length": {"rope_scaling": {"rope_type": "llama3", **BANDS}},
    "llama3, length beside": {
        "rope_scaling": LLAMA3,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_scaling": {"type": "yarn", **YARN}},
    "yarn, all that it has": {
        "rope_scaling": {
            "rope_type": "yarn",
            **YARN,
            "beta_fast": 16,
            "beta_slow": 2,
            "mscale": 0.7,
            "mscale_all_dim": 1.0,
            "truncate": False,
        }
    },
    "yarn, nulls": {
        "rope_scaling": {
            "rope_type": "yarn",
            **YARN,
            "factor": None,
            "beta_fast": None,
            "mscale": None,
            "attention_factor": None,
        }
    },
    "yarn, length beside": {
        "rope_scaling": {"rope_type": "yarn", **YARN},
        "original_max_position_embeddings": 64,
    },
    "yarn, no trained length": {"rope_scaling": {"rope_type": "yarn", "factor": 3.0}},
    "longrope": {"rope_scaling": {"type": "longrope", **LONGROPE}},
    # transformers 5
    "parameters": {"rope_parameters": DEFAULT},
    "parameters without type": {"rope_parameters": {"rope_theta": 500.0}},
    "parameters without theta": {"rope_parameters": LINEAR},
    "theta beside parameters": {"rope_theta": 500.0, "rope_parameters": LINEAR},
    "theta twice": {"rope_theta": 7000.0, "rope_parameters": DEFAULT},
    "null parameters": {"rope_parameters": None, "rope_theta": 500.0},
    "llama3 parameters": {"rope_parameters": {**LLAMA3, "rope_theta": 500.0}},
    "dynamic parameters": {
        "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 500.0}
    },
    "yarn parameters": {"rope_parameters": {"rope_type": "yarn", **YARN, "attention_factor": 1.5}},
    "longrope parameters": {"rope_parameters": {"rope_type": "longrope", **LONGROPE}},
    "proportional parameters": {
        "rope_parameters": {**DEFAULT, "rope_type": "proportional", "partial_rotary_factor": 0.5}
    },
    "partial factor, unscaled": {"rope_parameters": {**DEFAULT, "partial_rotary_factor": 0.5}},
    "whole factor, scaled": {"rope_parameters": {**LINEAR, "partial_rotary_factor": 1.0}},
    # Both
    "scaling added": {"rope_scaling": LINEAR, "rope_parameters": DEFAULT},
    "scaling and theta added": {
        "rope_scaling": LINEAR,
        "rope_theta": 700.0,
        "rope_parameters": DEFAULT,
    },
    "null scaling beside parameters": {"rope_scaling": None, "rope_parameters": DEFAULT},
    "empty scaling beside parameters": {"rope_scaling": {}, "rope_parameters": LINEAR},
    "default scaling beside linear": {
        "rope_scaling": {"rope_type": "default"},
        "rope_parameters": LINEAR,
    },
    # Sizes and options
    "no key/value heads": {"num_key_value_heads": ABSENT, "num_attention_heads": 8},
    "null head_dim": {"head_dim": None},
    "wide heads": {"head_dim": 24},
    "coarse eps": {"rms_norm_eps": 0.25},
    "no eps": {"rms_norm_eps": ABSENT},
    "no length": {"max_position_embeddings": ABSENT},
    "swish": {"hidden_act": "swish"},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "biases of attention": {"attention_bias": True},
    "window": {"sliding_window": 9},
    "wide window": {"sliding_window": 4096},
    "no window": {"sliding_window": ABSENT},
    "window put off": {"sliding_window": 9, "use_sliding_window": False},
    "layers in turn": {
        "layer_types": ["full_attention", "sliding_attention"],
        "num_hidden_layers": 2,
        "sliding_window": 9,
        "head_dim": 8,
    },
    "dtype": {"dtype": "float16"},
    "torch_dtype": {"torch_dtype": "float16"},
}


def same_tables(spec: DecoderSpec, theirs: Any) -> None:
    """Hold the rotary table against theirs, where layers have one in common."""
    rotary = getattr(theirs.base_model, "rotary_emb", None)
    if (
        rotary is None
        or len(spec.rotary) != 1
        or "layer_type" in signature(rotary.forward).parameters
    ):
        return
    # As far as both go; what is dynamic may not have been asked for more before.
    positions = torch.arange(min(512, spec.max_position_embeddings)).unsqueeze(0)
    cos, sin = rotary(torch.zeros(1), positions)
    for found, wanted in zip(
        rope_tables(spec.rotary[0], positions.shape[1]), (cos, sin), strict=True
    ):
        half = found.shape[1]
        if wanted.shape[-1] == 2 * half:  # which is each number twice: halves, or neighbours
            wanted = wanted[0][:, ::2] if twice_each(wanted[0]) else wanted[0][:, :half]
            assert (found - wanted).abs().max() < 1e-4


def twice_each(table: torch.Tensor) -> bool:
    """Say whether neighbours of a table are equal, which only tables of neighbours show."""
    return table.shape[1] > 2 and torch.equal(table[:, ::2], table[:, 1::2])


def named_as(spec: DecoderSpec, family: Family, theirs: Any) -> dict[str, Stored]:
    """Return what parameters are made of by the names that transformers has in memory."""
    present = theirs.state_dict().keys()
    namings = (naming(spec) for naming in (family.stored, *family.other_names))
    return next(
        found for found in namings if present >= {n for made in found.values() for n in made.names}
    )


def same_norms(spec: DecoderSpec, family: Family, theirs: Any) -> None:
    """Hold the eps of every norm that has parameters against theirs."""
    stored = named_as(spec, family, theirs)
    for path, module in Decoder(spec, context=1).named_modules():
        if isinstance(module, RMSNorm) and module.weight is not None:
            name = stored[f"{path}.weight"].names[0].removesuffix(".weight")
            norm = vars(theirs.get_submodule(name.replace("*", "0")))
            (eps,) = [norm[each] for each in ("eps", "variance_epsilon") if each in norm]
            assert module.eps == eps, path


def length_of(spec: DecoderSpec, config: Any) -> int:
    """Return the longest context of a configuration; one may have none of its own (BLOOM)."""
    names = ("max_position_embeddings", "max_seq_len")
    own = spec.max_position_embeddings
    return next((getattr(config, name) for name in names if hasattr(config, name)), own)


def same_options(model: Model, theirs: Any) -> None:
    config = theirs.config
    assert model.spec.max_position_embeddings == length_of(model.spec, config)
    assert model.spec.tie_word_embeddings == config.tie_word_embeddings
    same_norms(model.spec, model.family, theirs)


def scaled_so(entry: Entry, changes: Mapping[str, Any]) -> bool:
    """Say whether transformers scales RoPE in this way for a family, where that is said."""
    values = rope_values({key: value for key, value in changes.items() if value is not ABSENT})
    return not values or entry.scalings is None or rope_kind(values) in entry.scalings


def spelled() -> dict[str, tuple[str, str]]:
    """Return families with the spellings that transformers can make a model of."""
    return {
        f"{family}, {name}": (family, name)
        for family, entry in TABLE.items()
        for name in SPELLINGS
        if name not in entry.unread and scaled_so(entry, SPELLINGS[name])
        if entry.spelled or name == "silent"
    }


SPELLED = spelled()
NAMED_SO = [family for family, entry in TABLE.items() if entry.spelled]
# What all families read by the same functions is tried with two of them.
FURTHER = [
    label
    for label, (family, name) in SPELLED.items()
    if family not in ("llama", "mistral") and name != "silent"
]


@pytest.mark.parametrize("label", cases(SPELLED, FURTHER))
def test_a_config_means_what_transformers_makes_of_it(label: str, tmp_path: Path) -> None:
    model_type, spelling = SPELLED[label]
    theirs = checkpoint(tmp_path, model_type, SPELLINGS[spelling])
    model = open_model(tmp_path)
    same_options(model, theirs)
    if TABLE[model_type].spelled:
        same_tables(model.spec, theirs)
    decoder = Decoder(model.spec, CONTEXT, logits="all")
    fill(decoder, model.weights, plan=None, storage=None)
    tokens = tokens_for(97, CONTEXT)
    expected = expected_logits(theirs, tokens)
    with torch.inference_mode():
        rows = [
            decoder(torch.tensor([tokens[at : at + 32]]), torch.tensor([at]))[0]
            for at in range(0, CONTEXT, 32)
        ]
    assert expected.abs().max() > 1
    assert (torch.cat(rows) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("model_type", TABLE)
def test_what_a_config_leaves_out_is_what_transformers_takes(model_type: str) -> None:
    """Every tensor's shape, the norms' eps, the length, the count of layers, and the bases."""
    from transformers import AutoConfig, AutoModelForCausalLM

    needed = TABLE[model_type].needed
    config = AutoConfig.for_model(model_type, **needed)
    family = find_family({"model_type": model_type})
    whole = family.spec({"model_type": model_type, **needed})
    assert len(whole.layers) == config.num_hidden_layers
    assert whole.max_position_embeddings == length_of(whole, config)
    spec = family.spec({"model_type": model_type, "num_hidden_layers": 2, **needed})
    if len(spec.layers) != 2:  # which the family counts under another name
        spec = replace(whole, layers=whole.layers[:2])
    few = AutoConfig.for_model(model_type, num_hidden_layers=2, **needed)
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(few)
    tensors = {name: tuple(tensor.shape) for name, tensor in theirs.state_dict().items()}
    for tied in theirs.all_tied_weights_keys:
        del tensors[tied]
    shapes = {name: tuple(each.shape) for name, each in skeleton(spec).named_parameters()}
    expected = expected_tensors(named_as(spec, family, theirs), shapes)
    for unread in [name for name in tensors if any(fnmatch(name, p) for p in family.ignored)]:
        if unread != "lm_head.weight" and unread not in expected:
            del tensors[unread]
    assert expected == tensors
    same_norms(spec, family, theirs)


@pytest.mark.parametrize("model_type", ["llama", "glm"])
@pytest.mark.parametrize("context", [256, 384])
@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn"])
def test_a_scaling_reaches_beyond_the_length_in_the_file(
    kind: str, model_type: str, context: int, tmp_path: Path
) -> None:
    changes = {"rope_scaling": {"type": kind, "factor": 3.0}}
    config = write_config(tmp_path, model_type, changes)
    spec = find_family(config).spec(config)
    assert spec.longest_context == 3 * 128
    cos, sin = their_model(tmp_path).model.rotary_emb(
        torch.zeros(1), torch.arange(context).unsqueeze(0)
    )
    for found, wanted in zip(rope_tables(spec.rotary[0], context), (cos, sin), strict=True):
        assert (torch.cat((found, found), dim=1) - wanted[0]).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            SPELLINGS["scaling added"],
            "config.json holds rope_scaling ('linear') and rope_parameters ('default'), which "
            "differ; transformers takes rope_scaling alone, and so does this export.",
        ),
        (
            SPELLINGS["type and rope_type"],
            "config.json names the scaling of RoPE twice, type 'dynamic' and rope_type 'linear'; "
            "transformers takes rope_type, and so does this export.",
        ),
        (
            SPELLINGS["theta twice"],
            "config.json gives rope_theta twice, 7000.0 beside the sizes and 500.0 in "
            "rope_parameters; transformers takes the second, and so does this export.",
        ),
    ],
    ids=["scaling", "type", "theta"],
)
def test_what_contradicts_is_told(changes: dict[str, Any], told: str) -> None:
    for model_type in NAMED_SO:
        family = find_family({"model_type": model_type})
        assert family.notes({**SIZES, **changes}) == [told]


@pytest.mark.parametrize(
    "spelling", ["silent", "theta", "llama3", "parameters", "theta beside parameters"]
)
def test_what_agrees_is_not_told(spelling: str) -> None:
    for model_type in NAMED_SO:
        family = find_family({"model_type": model_type})
        assert family.notes({**SIZES, **SPELLINGS[spelling]}) == []
    both = {"rope_scaling": {"type": "linear", "factor": 4.0}, "rope_parameters": LINEAR}
    assert find_family({"model_type": "llama"}).notes({**SIZES, **both}) == []


def test_a_window_that_llama_does_not_have_is_told() -> None:
    (told,) = find_family({"model_type": "llama"}).notes({**SIZES, "sliding_window": 9})
    assert "sliding_window = 9, which transformers' Llama does not have" in told
    assert find_family({"model_type": "mistral"}).notes({**SIZES, "sliding_window": 9}) == []


@pytest.mark.parametrize("family", TABLE)
def test_no_table_of_angles_is_left_over(family: str, tmp_path: Path) -> None:
    """One that no layer turns by would not be in the program, and its export would fail."""
    for case in TABLE[family].cases.values():
        config = write_config(tmp_path, family, case)
        spec = find_family(config).spec(config)
        turned = {layer.mixer.rope for layer in spec.layers} - {None}
        assert turned == set(range(len(spec.rotary)))
