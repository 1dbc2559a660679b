"""Schemes by pattern: which matrix gets which, how that meets other settings, what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llm_coreml.config import ExportConfig, WeightSettings, resolve
from llm_coreml.config.scheme_text import fits, read_scheme
from llm_coreml.decoder import DecoderSpec
from llm_coreml.decoder.spec import PerLayerSpec
from llm_coreml.errors import ConfigError, LlmCoreMLError, UnsupportedError
from llm_coreml.quantize import make_plan
from llm_coreml.quantize.formats.schemes import Codebook, IntChannel, IntGroup, Scheme, Unquantized
from llm_coreml.quantize.plan.budget import mixed_options
from llm_coreml.quantize.plan.plan import QuantizationPlan, beside_blocks, matrices
from llm_coreml.quantize.plan.plan_file import parse_plan, plan_json
from llm_coreml.recipes import load_recipe
from tiny import small_spec

SPEC = small_spec(intermediate_size=96, vocab_size=1024)


def planned(spec: DecoderSpec = SPEC, **settings: Any) -> QuantizationPlan:
    return make_plan(resolve(ExportConfig(**settings), spec), spec)


def schemes(plan: QuantizationPlan) -> dict[str, Scheme]:
    names = [name for name, _ in matrices(SPEC)]
    return {name: plan.scheme_of(name) for name in ["embed_tokens", *names, "lm_head"]}


def test_a_pattern_decides_what_it_fits_and_nothing_else() -> None:
    given = schemes(planned(scheme="lm_head=codebook:6,layers.0.*=int8-channel"))
    usual = schemes(planned())
    assert given["lm_head"] == Codebook(6, 16)
    assert given["layers.0.mlp.up_proj"] == IntChannel(8)
    changed = {name for name in usual if given[name] != usual[name]}
    assert changed == {"lm_head", *(name for name in usual if name.startswith("layers.0."))}


def test_the_first_pattern_that_fits_decides() -> None:
    text = "layers.1.mlp.*=int8-group,layers.*.mlp.*=int4-channel,*=none"
    found = schemes(planned(scheme=text))
    assert found["layers.1.mlp.up_proj"] == IntGroup(8, 32)
    assert found["layers.0.mlp.up_proj"] == IntChannel(4)
    assert found["layers.1.self_attn.q_proj"] == found["embed_tokens"] == Unquantized(16)


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("lm_head", "lm_head", True),
        ("layers.1.*", "layers.10.mlp.up_proj", False),
        ("layers.[0-3].*", "layers.3.mlp.up_proj", True),
        ("*.up_proj", "layers.0.mlp.up_proj", True),
        ("model.layers.0.*", "layers.0.mlp.up_proj", True),
        ("Layers.*", "layers.0.mlp.up_proj", False),
        ("layers.0", "layers.0.mlp.up_proj", False),
    ],
)
def test_what_a_pattern_fits(pattern: str, name: str, expected: bool) -> None:
    assert fits(pattern, name) is expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("int4-group:group16", IntGroup(4, 16)),
        ("int4-group:group16:zero-float", IntGroup(4, 16, zero_point="float")),
        ("int8-channel:zero-int", IntChannel(8, zero_point="int")),
        ("int8-channel:zero-none", IntChannel(8)),
        ("codebook:3:rows8", Codebook(3, 8)),
        ("codebook:3:columns8", Codebook(3, None, columns=8)),
        ("codebook:3:rows8:columns8", Codebook(3, 8, columns=8)),
        ("codebook:6:whole", Codebook(6, None)),
        ("codebook:6:vector2", Codebook(6, 16, vector=2)),
        ("codebook:6:scaled", Codebook(6, 16, row_scale=True)),
        # Without options of their own they take the flags'.
        ("int4-group", IntGroup(4, 8, zero_point="int")),
        ("codebook:6", Codebook(6, 32)),
    ],
)
def test_a_format_has_options_of_its_own_or_the_flags(text: str, expected: Scheme) -> None:
    settings: dict[str, Any] = {"group_size": 8, "zero_point": "int", "codebook_rows": 32}
    plan = planned(scheme=f"layers.0.*={text}", **settings)
    assert plan.scheme_of("layers.0.mlp.up_proj") == expected
    tables = planned(embedding=text, lm_head=text, **settings)
    assert tables.embedding == tables.lm_head == planned(scheme=text, **settings).linear == expected


def test_bits_are_for_what_no_pattern_fits() -> None:
    found = schemes(planned(bits=8, scheme="layers.0.*=codebook:3"))
    assert found["layers.0.mlp.up_proj"] == Codebook(3, 16)
    assert found["layers.1.mlp.up_proj"] == IntChannel(8)
    both = schemes(planned(scheme="int8-group,layers.0.*=codebook:3"))
    assert both["layers.1.mlp.up_proj"] == IntGroup(8, 32)


def test_a_tied_head_follows_the_table_unless_a_pattern_fits_it() -> None:
    tied = replace(SPEC, tie_word_embeddings=True)
    same = planned(tied, scheme="embed_tokens=codebook:6")
    assert same.tied and same.lm_head == same.embedding == Codebook(6, 16)
    apart = planned(tied, scheme="lm_head=codebook:6")
    assert not apart.tied and apart.untied_bytes > 0 and apart.embedding == IntChannel(8)
    alone = planned(replace(SPEC, tie_word_embeddings=False), scheme="embed_tokens=codebook:6")
    assert alone.embedding == Codebook(6, 16) and alone.lm_head == IntChannel(8)


def test_mixed_formats_leave_what_a_pattern_fits() -> None:
    config = ExportConfig(bits=3.5, scheme="layers.0.self_attn.*=int8-channel,lm_head=codebook:6")
    options = mixed_options(resolve(config, SPEC), SPEC)
    assert options["layers.0.self_attn.q_proj"] == (IntChannel(8),)
    assert len(options["layers.1.self_attn.q_proj"]) > 3
    assert make_plan(resolve(config, SPEC), SPEC, {n: each[0] for n, each in options.items()}) == (
        planned(SPEC, bits=2, scheme=config.scheme)
    )


def test_tables_beside_the_blocks_have_names_too_and_come_back_from_a_plan() -> None:
    spec = replace(SPEC, per_layer=PerLayerSpec(128, 32))
    (name, shape), (other, _) = beside_blocks(spec)
    config = ExportConfig(scheme=f"embed_tokens=codebook:6,{name}=int4-channel")
    job = resolve(config, spec)
    plan = make_plan(job, spec)
    assert (plan.embedding, plan.scheme_of(name)) == (Codebook(6, 16), IntChannel(4))
    # Without a pattern of its own a table is what --embedding says, and not what its neighbour is.
    assert plan.scheme_of(other) == IntChannel(8)
    recorded = plan_json(plan, spec, {})
    assert recorded["matrices"][name]["shape"] == list(shape)
    plain = resolve(ExportConfig(), spec)
    assert make_plan(plain, spec, parse_plan(recorded, plain, spec)) == plan


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        (
            {"scheme": "layers.7.*=none"},
            ConfigError,
            "--scheme: no matrix fits 'layers.7.*'; their names are embed_tokens, "
            "layers.0.self_attn.q_proj to layers.1.mlp.down_proj and lm_head.",
        ),
        (
            {"scheme": "layers.0=none"},
            ConfigError,
            "Did you mean 'layers.0.*'?",
        ),
        (
            {"scheme": "model.layers.0.mlp.up_poj.weight=none"},
            ConfigError,
            "Did you mean 'layers.0.mlp.up_proj'?",
        ),
        (
            {"scheme": "layers.*=none,layers.0.*=int8-channel"},
            ConfigError,
            "--scheme: 'layers.0.*' decides nothing, since 'layers.*' stands before it and the "
            "first pattern that fits a matrix decides; put the narrower one first.",
        ),
        (
            {"scheme": "lm_head=int8-chanel"},
            ConfigError,
            "--scheme lm_head=int8-chanel is not known; give one of",
        ),
        (
            {"scheme": "lm_head=codebook:5"},
            UnsupportedError,
            "--scheme lm_head= asks for a 5 bit codebook; Core ML holds",
        ),
        (
            {"scheme": "lm_head=int8-channel:group32"},
            ConfigError,
            "int8-channel:group32: int8-channel has no option 'group32'; its options are zero.",
        ),
        (
            {"scheme": "lm_head=codebook:6:rows24"},
            UnsupportedError,
            "the output head has 1024 rows, which --codebook-rows 24 does not divide",
        ),
        (
            {"scheme": "layers.0.*=int4-group", "target": "ane"},
            UnsupportedError,
            "Use --scheme layers.0.*=codebook, or --force to export it all the same.",
        ),
        (
            {"scheme": "layers.0.*=none", "calibrate": "bundled"},
            ConfigError,
            "--calibrate chooses codes, and unquantized linear layers have none",
        ),
        (
            {"bits": 4, "scheme": "codebook:6"},
            ConfigError,
            "--bits is 4, and --scheme is codebook:6; each says how many bits the "
            "weights have, so drop one.",
        ),
    ],
    ids=str,
)
def test_what_is_refused_where_the_model_is_known(
    settings: dict[str, Any], kind: type[LlmCoreMLError], message: str
) -> None:
    with pytest.raises(kind) as caught:
        planned(**settings)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scheme": "a=none,a=int8-channel"}, "--scheme gives the pattern 'a' twice"),
        ({"scheme": "lm_head=,b=none"}, "--scheme 'lm_head=,b=none' has an empty part"),
        ({"scheme": "=none"}, "has an empty part"),
        ({"scheme": ""}, "has an empty part"),
        ({"scheme": "none,int8-channel"}, "--scheme names two formats for all linear layers"),
        ({"scheme": "none,*=int8-channel"}, "--scheme says what * has, so nothing is left for"),
        ({"scheme": "lm_head=codebook:rows"}, "'codebook:rows' holds 'rows', which is no option"),
        ({"scheme": "a=codebook:rows8:rows8"}, "'codebook:rows8:rows8' gives one thing twice"),
        ({"scheme": "a=codebook:whole:rows8"}, "'codebook:whole:rows8' gives one thing twice"),
        (
            {"scheme": "*=none", "bits": 4},
            "--scheme *=none decides what --bits 4 would; drop one of them.",
        ),
        (
            {"scheme": "lm_head=none", "lm_head": "int8-channel"},
            "--scheme lm_head=none decides what --lm-head int8-channel would; drop one of them.",
        ),
        (
            {"scheme": "embed*=none", "embedding": "int4-channel"},
            "--scheme embed*=none decides what --embedding int4-channel would; drop one of them.",
        ),
        (
            {"plan": "p.json", "scheme": "lm_head=none"},
            "--plan decides what --scheme lm_head=none would; drop one of them.",
        ),
        (
            {"bits": 3.5, "scheme": "int4-group,lm_head=none"},
            "--bits 3.5 decides what --scheme int4-group,lm_head=none would; drop one of them.",
        ),
    ],
    ids=str,
)
def test_what_is_refused_without_a_model(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ExportConfig(**settings)
    assert message in str(caught.value)


def test_given_settings_leave_the_patterns_of_a_recipe_that_they_do_not_contradict() -> None:
    base = ExportConfig(scheme="int4-group,lm_head=codebook:6")
    assert base.under({"bits": 3}).scheme == "lm_head=codebook:6"
    assert base.under({"bits": 3.5}).scheme == "lm_head=codebook:6"
    assert base.under({"bits": 4}).scheme == base.scheme
    assert base.under({"plan": "p.json"}).scheme is None
    tables = ExportConfig(bits=4, embedding="none", lm_head="int8-channel")
    head = tables.under({"scheme": "lm_head=codebook:6"})
    assert (head.bits, head.embedding, head.lm_head) == (4, "none", None)
    everything = tables.under({"scheme": {"*": "int8-channel"}})
    assert (everything.bits, everything.embedding) == (None, None)


def test_a_recipe_spells_patterns_as_a_text_or_as_a_mapping(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    text = "lm_head=codebook:6,layers.0.*=int8-channel"
    path.write_text(f"model: a/b\nweights: {{scheme: '{text}'}}\n")
    assert load_recipe(path).config.scheme == text
    path.write_text(
        "model: a/b\nweights:\n  scheme:\n    lm_head: codebook:6\n    layers.0.*: int8-channel\n"
    )
    config = load_recipe(path).config
    assert config.scheme == text and config.flags() == ["--scheme", text]
    assert ExportConfig.from_json({"scheme": {"lm_head": None}}).scheme == "lm_head=none"
    path.write_text("model: a/b\nweights: {scheme: {lm_head: 6}}\n")
    with pytest.raises(ConfigError, match=r"weights\.scheme\.lm_head is 6; it must be a text or"):
        load_recipe(path)
    path.write_text("model: a/b\nweights: {scheme: {'a=b': none}}\n")
    with pytest.raises(ConfigError, match="'a=b' is no pattern of names"):
        load_recipe(path)


def test_nothing_is_read_into_a_plain_scheme() -> None:
    assert read_scheme("int4-group").patterns == {}
    assert ExportConfig(scheme="int4-group").scheme == "int4-group"
    unquantized = ExportConfig(scheme="none,embed_tokens=int8-channel")
    assert resolve(unquantized, SPEC).weights == replace(
        unquantized.section(WeightSettings), embedding="none"
    )
