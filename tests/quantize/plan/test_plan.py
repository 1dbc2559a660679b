"""From flags to schemes: what each pair means and costs, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from llm_coreml.bundle.record import bits_per_weight
from llm_coreml.config import ExportConfig, WeightSettings, resolve
from llm_coreml.config.values import WHOLE_BITS, takes_bits
from llm_coreml.errors import ConfigError, LlmCoreMLError, UnsupportedError
from llm_coreml.quantize import SCHEMES, Scheme, make_plan
from llm_coreml.quantize.formats.schemes import Codebook, IntChannel, IntGroup, Mxfp4, Unquantized
from llm_coreml.quantize.plan.flags import linear_scheme
from tiny import small_spec

SPEC = small_spec(intermediate_size=96)
TIED = replace(SPEC, tie_word_embeddings=True)
NEURAL_ENGINE = (
    "the Neural Engine takes per-channel and palettized weights only and has been reported to "
    "fall back or compute wrong values with per-block int4 (coremltools issue 2510)"
)

SCALED_TABLES = (
    "the Neural Engine's compiler has been reported to abort on a scale of what a table gives "
    "(coremltools pull request 2688)"
)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, IntGroup(4, 32)),
        ({"bits": 4}, IntGroup(4, 32)),
        ({"bits": 4, "target": "ane"}, Codebook(4, 16)),
        ({"target": "all"}, Codebook(4, 16)),
        ({"target": "cpu", "group_size": 16}, IntGroup(4, 16)),
        ({"bits": 8}, IntChannel(8)),
        ({"bits": 8, "scheme": "codebook"}, Codebook(8, 16)),
        ({"scheme": "int8-group", "bits": 8}, IntGroup(8, 32)),
        ({"zero_point": "int"}, IntGroup(4, 32, zero_point="int")),
        ({"bits": 8, "zero_point": "float"}, IntChannel(8, zero_point="float")),
        ({"bits": 3}, Codebook(3, 16)),
        ({"bits": 3, "codebook_columns": 8}, Codebook(3, None, columns=8)),
        ({"bits": 2, "codebook_columns": 8, "codebook_rows": 4}, Codebook(2, 4, columns=8)),
        ({"bits": 2, "codebook_vector": 2}, Codebook(2, 16, vector=2)),
        ({"bits": 2, "codebook_scale": True}, Codebook(2, 16, row_scale=True)),
        ({"scheme": "int3-group", "minimum_os": "macOS26"}, IntGroup(3, 32)),
        ({"scheme": "mxfp4", "bits": 4, "minimum_os": "iOS26"}, Mxfp4()),
        ({"bits": 1, "codebook_rows": 8}, Codebook(1, 8)),
        ({"bits": 6}, Codebook(6, 16)),
        ({"bits": 16}, Unquantized(16)),
        ({"scheme": "none"}, Unquantized(16)),
        ({"scheme": "none", "compute_precision": "fp32"}, Unquantized(32)),
        ({"scheme": "int4-channel"}, IntChannel(4)),
        ({"scheme": "int8-channel", "target": "ane"}, IntChannel(8)),
        ({"scheme": "int4-group", "target": "ane", "force": True}, IntGroup(4, 32)),
    ],
)
def test_what_bits_and_scheme_mean(settings: dict[str, Any], expected: Scheme) -> None:
    assert linear_scheme(resolve(ExportConfig(**settings), SPEC)) == expected


@pytest.mark.parametrize(
    ("settings", "embedding", "lm_head"),
    [
        ({}, IntChannel(8), IntChannel(8)),
        ({"bits": 8}, IntChannel(8), IntChannel(8)),
        ({"scheme": "none"}, Unquantized(16), Unquantized(16)),
        ({"bits": 16}, Unquantized(16), Unquantized(16)),
        ({"bits": 16, "scheme": "none"}, Unquantized(16), Unquantized(16)),
        ({"bits": 16, "compute_precision": "fp32"}, Unquantized(32), Unquantized(32)),
        ({"bits": 16, "embedding": "int8-channel"}, IntChannel(8), IntChannel(8)),
        ({"scheme": "none", "lm_head": "int4-channel"}, Unquantized(16), IntChannel(4)),
        ({"bits": 16, "embedding": "int8-group", "lm_head": "none"}, IntGroup(8), Unquantized(16)),
        ({"bits": 4, "embedding": "none"}, Unquantized(16), Unquantized(16)),
    ],
    ids=str,
)
def test_nothing_is_quantized_where_nothing_is_asked_to_be(
    settings: dict[str, Any], embedding: Scheme, lm_head: Scheme
) -> None:
    named = {key: value for key, value in settings.items() if key != "compute_precision"}
    recipe = ExportConfig.from_json({"weights": named})
    for config in (ExportConfig(**settings), ExportConfig().under(settings)):
        plan = make_plan(resolve(config, SPEC), SPEC)
        assert (plan.embedding, plan.lm_head) == (embedding, lm_head)
        assert recipe.section(WeightSettings) == config.section(WeightSettings)


def test_manifests_that_record_the_usual_table_mean_it() -> None:
    """Earlier releases recorded the default; a plan stood beside it."""
    config = ExportConfig.from_json({"weights": {"plan": "p.json", "embedding": "int8-channel"}})
    assert config.plan == "p.json"
    with pytest.raises(ConfigError, match="--plan decides what --scheme int8-channel would"):
        ExportConfig(plan="p.json", scheme="int8-channel")


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        (
            {"group_size": 48},
            UnsupportedError,
            "layers.0.self_attn.q_proj has 64 inputs, which --group-size 48 does not divide; use a "
            "group size that does, such as 32, or int4-channel, which has no groups.",
        ),
        (
            {"scheme": "codebook", "codebook_rows": 24},
            UnsupportedError,
            "layers.0.self_attn.q_proj has 64 rows, which --codebook-rows 24 does not divide; use "
            "a number that does, such as 16.",
        ),
        (
            {"embedding": "codebook:4"},
            UnsupportedError,
            "the token table has 1000 rows, which --codebook-rows 16 does not divide; use a number "
            "that does, such as 10.",
        ),
        (
            {"lm_head": "codebook:4"},
            UnsupportedError,
            "the output head has 1000 rows, which --codebook-rows 16 does not divide; use a number "
            "that does, such as 10.",
        ),
        (
            {"bits": 3, "scheme": "int4-group"},
            UnsupportedError,
            "--bits asks for 3 bit int4-group; Core ML holds integer weights of 4 and 8 bits only. "
            "Use --scheme codebook for 1, 2, 3, 4, 6 or 8 bits.",
        ),
        (
            {"bits": 4, "scheme": "int8-channel"},
            UnsupportedError,
            "--bits asks for 4 bit int8-channel; Core ML holds integer weights of 4 and 8 bits "
            "only. Use --scheme codebook for 1, 2, 3, 4, 6 or 8 bits.",
        ),
        (
            {"bits": 4, "scheme": "none"},
            ConfigError,
            "--scheme none keeps 16 bits, but --bits is 4; drop one of them.",
        ),
        *[
            (
                {"embedding": f"codebook:{bits}"},
                UnsupportedError,
                f"--embedding asks for a {bits} bit codebook; Core ML holds 1, 2, 3, 4, 6 and 8 "
                "bits.",
            )
            for bits in (5, 7)
        ],
        (
            {"lm_head": "codebook:7"},
            UnsupportedError,
            "--lm-head asks for a 7 bit codebook; Core ML holds 1, 2, 3, 4, 6 and 8 bits.",
        ),
        (
            {"embedding": "int8"},
            ConfigError,
            "--embedding int8 is not known; give one of int4-group, int4-channel, int8-group, "
            "int8-channel, codebook, int2-group, int3-group, int6-group, mxfp4, none, codebooks as "
            "codebook:4. Did you mean 'int8-group'?",
        ),
        (
            {"lm_head": "codebook:four"},
            ConfigError,
            "--lm-head: 'codebook:four' holds 'four', which is no option of a format; they are "
            "groupN, zero-int, zero-float, rowsN, columnsN, whole, vectorN and scaled.",
        ),
        (
            {"scheme": "int4-groups"},
            ConfigError,
            "There is no scheme 'int4-groups'; the schemes are int4-group, int4-channel, "
            "int8-group, int8-channel, codebook, int2-group, int3-group, int6-group, mxfp4, none. "
            "Did you mean 'int4-group'?",
        ),
        (
            {"scheme": "int4-group", "target": "ane"},
            UnsupportedError,
            f"--target ane does not take int4-group: {NEURAL_ENGINE}. Use --scheme codebook, or "
            "--force to export it all the same.",
        ),
        (
            {"scheme": "int4-group", "target": "all"},
            UnsupportedError,
            f"--target all does not take int4-group: {NEURAL_ENGINE}. Use --scheme codebook, or "
            "--force to export it all the same.",
        ),
        (
            {"scheme": "int8-group", "target": "ane"},
            UnsupportedError,
            "--target ane does not take int8-group: the Neural Engine has been reported to compute "
            "wrong values with per-block int8, without an error (coreai-models issue 279). Use "
            "--scheme int8-channel, or --force to export it all the same.",
        ),
        (
            {"bits": 3, "codebook_columns": 24},
            UnsupportedError,
            "layers.0.self_attn.q_proj has 64 columns, which --codebook-columns 24 does not "
            "divide; use a number that does, such as 16.",
        ),
        (
            {"scheme": "mxfp4"},
            UnsupportedError,
            "iOS18 is too old for mxfp4, which Core ML runs from iOS26 on. Use --minimum-os iOS26 "
            "or --scheme int4-channel, or --force to export it all the same.",
        ),
        (
            {"embedding": "int3-group", "minimum_os": "macOS15"},
            UnsupportedError,
            "macOS15 is too old for int3-group, which Core ML runs from iOS26 on. Use --minimum-os "
            "iOS26 or --embedding int4-channel, or --force to export it all the same.",
        ),
        (
            {"scheme": "int2-group", "target": "ane", "minimum_os": "iOS26"},
            UnsupportedError,
            f"--target ane does not take int2-group: {SCALED_TABLES}. Use --scheme codebook, or "
            "--force to export it all the same.",
        ),
        (
            {"bits": 4, "target": "all", "codebook_scale": True},
            UnsupportedError,
            f"--target all does not take codebook: {SCALED_TABLES}. Use --no-codebook-scale, "
            "or --force to export it all the same.",
        ),
        (
            {"scheme": "mxfp4", "minimum_os": "iOS26", "embedding": "none", "lm_head": "none"},
            UnsupportedError,
            "layers.0.self_attn.q_proj has 48 inputs, which the 32 of an mxfp4 group do not "
            "divide; use int4-channel, which has no groups.",
        ),
        (
            {"scheme": "codebook", "codebook_vector": 3},
            ConfigError,
            "--codebook-vector is 3; it must be 1, 2 or 4.",
        ),
        (
            {"scheme": "codebook", "codebook_vector": 4, "codebook_rows": 6},
            ConfigError,
            "--codebook-vector 4 does not divide --codebook-rows 6; an entry of a table belongs to "
            "as many rows.",
        ),
        (
            {"scheme": "codebook", "codebook_vector": 2, "codebook_scale": True},
            UnsupportedError,
            "--codebook-scale and --codebook-vector exclude each other; drop one of them.",
        ),
        (
            {"zero_point": "integer"},
            ConfigError,
            "zero_point is 'integer'; it must be none or int or float.",
        ),
        ({"group_size": 0}, ConfigError, "--group-size is 0; it must be at least 1."),
        (
            {"scheme": "codebook", "codebook_rows": 0},
            ConfigError,
            "--codebook-rows is 0; it must be at least 1.",
        ),
    ],
)
def test_what_cannot_be_held_is_refused_before_any_work(
    settings: dict[str, Any], kind: type[LlmCoreMLError], message: str
) -> None:
    spec = replace(SPEC, hidden_size=48) if settings.get("scheme") == "mxfp4" else SPEC
    with pytest.raises(kind) as caught:
        make_plan(resolve(ExportConfig(**settings), spec), spec)
    assert str(caught.value) == message


@pytest.mark.parametrize("bits", WHOLE_BITS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_names_say_which_bits_a_format_takes(scheme: str, bits: int) -> None:
    job = resolve(ExportConfig(scheme=scheme, bits=bits), SPEC)
    if takes_bits(scheme, bits):
        assert linear_scheme(job).bits == bits
        return
    with pytest.raises((ConfigError, UnsupportedError), match=rf"\b{bits}\b"):
        linear_scheme(job)


@pytest.mark.parametrize("bits", [5, 7])
def test_codebooks_of_5_and_7_bits_are_no_setting_at_all(bits: int) -> None:
    with pytest.raises(ConfigError, match=rf"--bits is {bits}; Core ML holds weights of 1, 2, 3,"):
        ExportConfig(bits=bits, scheme="codebook")


@pytest.mark.parametrize("target", ["ane", "all"])
def test_force_exports_what_the_target_is_known_to_refuse(target: str) -> None:
    plan = make_plan(
        resolve(ExportConfig(scheme="int4-group", target=target, force=True), SPEC), SPEC
    )
    assert plan.linear == IntGroup(4, 32)


def test_a_table_that_the_target_refuses_is_refused_too() -> None:
    with pytest.raises(UnsupportedError, match="--target ane does not take int4-group"):
        make_plan(resolve(ExportConfig(target="ane", embedding="int4-group"), SPEC), SPEC)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("none", Unquantized(16)),
        ("int4-channel", IntChannel(4)),
        ("int8-channel:8", IntChannel(8)),
        ("int4-group", IntGroup(4, 32)),
        ("codebook", Codebook(4, 8)),
        ("codebook:6", Codebook(6, 8)),
    ],
)
def test_table_schemes_are_parsed(text: str, expected: Scheme) -> None:
    plan = make_plan(resolve(ExportConfig(embedding=text, codebook_rows=8), SPEC), SPEC)
    assert plan.embedding == plan.lm_head == expected
    plan = make_plan(
        resolve(ExportConfig(embedding="none", lm_head=text, codebook_rows=8), SPEC), SPEC
    )
    assert (plan.embedding, plan.lm_head) == (Unquantized(16), expected)


def test_a_tied_table_costs_twice_where_the_formats_differ() -> None:
    same = make_plan(resolve(ExportConfig(embedding="int8-channel"), TIED), TIED)
    assert same.tied and same.untied_bytes == 0
    differing = make_plan(
        resolve(ExportConfig(embedding="int8-channel", lm_head="int4-group"), TIED), TIED
    )
    assert not differing.tied
    assert differing.untied_bytes == 1000 * 64 // 2 + 1000 * 2 * 2
    untied = make_plan(
        resolve(ExportConfig(embedding="int8-channel", lm_head="int4-group"), SPEC), SPEC
    )
    assert not untied.tied and untied.untied_bytes == 0


@pytest.mark.parametrize(
    ("scheme", "bits"),
    [
        (IntGroup(4, 32), 4.5),
        (IntGroup(4, 8), 6.0),
        (IntGroup(4, 32, zero_point="int"), 4 + (16 + 4) / 32),
        (IntGroup(4, 32, zero_point="float"), 5.0),
        (IntGroup(8, 32, zero_point="int"), 8.75),
        (IntChannel(8, zero_point="int"), 8.25),
        (IntChannel(4), 4 + 16 / 96),
        (IntChannel(8), 8 + 16 / 96),
        (Codebook(1, 16), 1 + 16 * 2 / (16 * 96)),
        (Codebook(4, 8), 4 + 16 * 16 / (8 * 96)),
        (Codebook(4, None, columns=12), 4 + 16 * 16 / (64 * 12)),
        (Codebook(4, 16, columns=32), 4 + 16 * 16 / (16 * 32)),
        (Codebook(4, 16, vector=2), 2 + 16 * 2 * 16 / (16 * 96)),
        (Codebook(6, 64, vector=4), 1.5 + 16 * 4 * 64 / (64 * 96)),
        (Codebook(4, 16, row_scale=True), 4 + (16 * 16 / 16 + 16) / 96),
        (IntGroup(2, 32), 2.5 + 8 * 4 / (64 * 96)),
        (IntGroup(3, 32, zero_point="int"), 3 + 24 / 32 + 8 * 8 / (64 * 96)),
        (IntGroup(6, 16, zero_point="float"), 8 + 8 * 64 / (64 * 96)),
        (Mxfp4(), 4.5 + 8 * 16 / (64 * 96)),
        (Codebook(8, 64), 8 + 16 * 256 / (64 * 96)),
        (Unquantized(16), 16.0),
        (Unquantized(32), 32.0),
    ],
)
def test_bits_per_weight_count_scales_and_tables(scheme: Scheme, bits: float) -> None:
    assert scheme.bits_per_weight((64, 96)) == pytest.approx(bits, rel=1e-12)


def test_bits_per_weight_of_a_model_count_a_tied_table_once() -> None:
    config = ExportConfig(scheme="none", embedding="int8-channel")
    blocks = 2 * (64 * 64 * 2 + 32 * 64 * 2 + 3 * 64 * 96)
    table = 1000 * 64
    per_row = 8 + 16 / 64
    once = (16 * blocks + per_row * table) / (blocks + table)
    twice = (16 * blocks + 2 * per_row * table) / (blocks + 2 * table)
    assert bits_per_weight(make_plan(resolve(config, TIED), TIED), TIED) == pytest.approx(once)
    assert bits_per_weight(make_plan(resolve(config, SPEC), SPEC), SPEC) == pytest.approx(twice)


def test_every_scheme_is_described() -> None:
    plans = [linear_scheme(resolve(ExportConfig(scheme=name), SPEC)) for name in SCHEMES]
    assert [scheme.name for scheme in plans] == list(SCHEMES)
    assert len({scheme.label for scheme in plans}) == len(plans)
