"""Settings of an export: what is refused, with which words, and how a command is rebuilt."""

from __future__ import annotations

import json
import math
import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_coreml.bundle.record import rebuild_command
from llm_coreml.checkpoint import Source
from llm_coreml.config import SECTIONS, ExportConfig, Shapes, resolve, resolve_shapes
from llm_coreml.config.schema import sections_schema
from llm_coreml.config.setting import settings_of
from llm_coreml.config.values import checked_count
from llm_coreml.errors import ConfigError, LlmCoreMLError, UnsupportedError
from llm_coreml.rules import Use, refused
from llm_coreml.systems import MINIMUM_OS, opset_of
from llm_coreml.targets import TARGETS
from tiny import small_spec

SPEC = small_spec(max_position_embeddings=100)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"context": 33}, "--context is 33; it must be a multiple of 32, such as 32."),
        ({"context": 100}, "--context is 100; it must be a multiple of 32, such as 96."),
        ({"context": 5}, "--context is 5; it must be a multiple of 32, such as 32."),
        ({"context": 0}, "--context is 0; it must be a multiple of 32, such as 32."),
        ({"context": -32}, "--context is -32; it must be a multiple of 32, such as 32."),
        (
            {"seq_lengths": (8, 64)},
            "--seq-lengths 8,64 lacks 1, without which no single token can be generated; add it.",
        ),
        (
            {"seq_lengths": (1, 8, 8)},
            "--seq-lengths 1,8,8 must be different numbers of at least 1.",
        ),
        ({"seq_lengths": (0, 1)}, "--seq-lengths 0,1 must be different numbers of at least 1."),
        (
            {"seq_lengths": tuple(range(1, 130))},
            "--seq-lengths holds 129 lengths; Core ML allows 128.",
        ),
        (
            {"bits": 5},
            "--bits is 5; Core ML holds weights of 1, 2, 3, 4, 6, 8 and 16 bits.",
        ),
        (
            {"plan": "p.json", "group_size": 64},
            "--plan decides what --group-size 64 would; drop one of them.",
        ),
        (
            {"tune": 50},
            "--tune is 50; it must be a number of steps, some hundreds, and needs a text to read: "
            "--calibrate.",
        ),
        ({"logits": "first"}, "logits is 'first'; it must be last or all."),
        ({"compute_precision": "bf16"}, "compute_precision is 'bf16'; it must be fp16 or fp32."),
        ({"backend": "mps"}, "backend is 'mps'; it must be coreml or xnnpack."),
        (
            {"target": "anee"},
            "There is no target 'anee'; the targets are gpu, ane, cpu, all. Did you mean 'ane'?",
        ),
        (
            {"minimum_os": "ios18"},
            f"There is no OS 'ios18'; known are {', '.join(MINIMUM_OS)}. Did you mean 'iOS18'?",
        ),
    ],
    ids=lambda value: None if isinstance(value, str) else ",".join(value),
)
def test_settings_that_break_a_rule(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ExportConfig(**settings)
    assert str(caught.value) == message
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": "4"}, "bits is '4'; it must be a number or None."),
        ({"bits": True}, "bits is True; it must be a number or None."),
        ({"size": "600MB"}, "size is '600MB'; it must be a whole number or None."),
        ({"size": float("nan")}, "size is nan; it must be a whole number or None."),
        ({"group_size": 32.5}, "group_size is 32.5; it must be a whole number."),
        ({"group_size": True}, "group_size is True; it must be a whole number."),
        ({"tune": "3"}, "tune is '3'; it must be a whole number."),
        ({"context": float("inf")}, "context is inf; it must be a whole number or None."),
        ({"context": [32]}, "context is a list; it must be a whole number or None."),
        ({"seq_lengths": 5}, "seq_lengths is 5; it must be a list, each part a whole number or"),
        (
            {"seq_lengths": "1;8"},
            "seq_lengths is '1;8': '1;8' is no list of numbers such as 1,8,64",
        ),
        ({"seq_lengths": (1, 8.5)}, "seq_lengths is (1, 8.5); it must be a list, each part a"),
        ({"group_size": None}, "group_size is None; it must be a whole number."),
        ({"target": None}, "target is None; it must be a text."),
        ({"zero_point": None}, "zero_point is 'None'; it must be none or int or float."),
        ({"plan": Path("p.json")}, "plan is "),
        ({"force": 1}, "force is 1; it must be true or false."),
    ],
    ids=str,
)
def test_values_of_another_kind_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ExportConfig(**settings)
    assert str(caught.value).startswith(message)


WHOLE = [each for each in settings_of(ExportConfig) if each.kind is int]


@pytest.mark.parametrize("value", [2**63, 10**30, -(10**30), 10**5000, 1e300], ids=range(5))
@pytest.mark.parametrize("setting", WHOLE, ids=lambda each: each.name)
def test_numbers_beyond_64_bits_are_refused_in_a_sentence(setting: Any, value: float) -> None:
    others = {"calibrate": "bundled"} if setting.name == "tune" else {}
    given = (1, value) if setting.many else value
    with pytest.raises(ConfigError) as caught:
        ExportConfig(**{setting.name: given, **others})
    message = str(caught.value)
    assert setting.flag in message and len(message) < 300


@pytest.mark.parametrize(
    "value",
    [0, -1, 2**31, 10**5000, 1.0, True, "1", None, math.nan],
    ids=range(9),
)
def test_counts_that_are_none(value: object) -> None:
    with pytest.raises(ConfigError, match=r"^--tokens is .*; it must be a whole number from 1 to"):
        checked_count("--tokens", value)
    assert checked_count("--top", 0, least=0) == 0


def test_every_whole_number_has_a_largest_one() -> None:
    assert all(each.most is not None for each in WHOLE)


@pytest.mark.parametrize("bits", [10**400, -(10**400), math.nan, math.inf, 0, 17, 1e-300])
def test_bits_that_are_no_width(bits: float) -> None:
    with pytest.raises(ConfigError, match=r"--bits is .*; Core ML holds weights of 1, 2, 3"):
        ExportConfig(bits=bits)


def test_whole_numbers_are_ints_however_they_were_written() -> None:
    values = {
        "weights": {"bits": 4.0, "group_size": 64.0},
        "program": {"context": 1024.0, "seq_lengths": [1, 8.0]},
    }
    config = ExportConfig.from_json(values)
    assert config.flags() == [
        *("--bits", "4", "--group-size", "64", "--context", "1024", "--seq-lengths", "1,8")
    ]
    assert ExportConfig(seq_lengths=[8, 1.0], tune=0.0).seq_lengths == (8, 1)  # type: ignore[arg-type]
    assert ExportConfig(bits=3.5).bits == 3.5


@pytest.mark.parametrize("system", ["iOS17", "iOS16", "macOS14", "visionOS1"])
def test_systems_before_states_are_refused_for_a_cache_that_is_one(system: str) -> None:
    config = ExportConfig(minimum_os=system)
    with pytest.raises(UnsupportedError) as caught:
        resolve(config, small_spec())
    assert str(caught.value) == (
        f"{system} is too old: Core ML keeps a KV cache as state from iOS18 and macOS15 on; give "
        "--kv-cache inputs, or use --minimum-os iOS18."
    )
    assert resolve(replace(config, kv_cache="inputs"), small_spec()).opset < "iOS18"
    with pytest.raises(UnsupportedError, match="too old: Core ML has models of several functions"):
        resolve(replace(config, functions="prefill:8,decode:1"), small_spec())


@pytest.mark.parametrize("system", ["iOS15", "iOS13", "macOS12", "watchOS8"])
def test_systems_before_weights_of_8_bits_are_refused(system: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        ExportConfig(minimum_os=system)
    assert str(caught.value).startswith(f"{system} is too old: Core ML takes fp16 inputs and")


@pytest.mark.parametrize(("system", "opset"), MINIMUM_OS.items())
def test_every_known_system_names_an_opset_of_coremltools(system: str, opset: str) -> None:
    import coremltools

    assert opset_of(system) == opset
    known = coremltools.target.__members__
    # coremltools has no word for visionOS; its systems follow those of iOS.
    assert known[opset] == known.get(system, known[opset])


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_targets_name_units_of_coremltools(target: Any) -> None:
    import coremltools

    assert target.compute_unit in coremltools.ComputeUnit.__members__
    for opset in sorted(set(MINIMUM_OS.values())):
        assert not refused(Use(target, opset, (target.default_scheme,), "iOS16"))


@pytest.mark.parametrize(
    ("settings", "positions", "expected"),
    [
        ({}, 8192, Shapes(2048, (1, 8, 64, 512))),
        ({}, 1000, Shapes(992, (1, 8, 64, 512))),
        ({}, 512, Shapes(512, (1, 8, 64, 512))),
        ({}, 100, Shapes(96, (1, 8, 64))),
        ({}, 33, Shapes(32, (1, 8))),
        ({"context": 4096}, 8192, Shapes(4096, (1, 8, 64, 512))),
        ({"context": 96, "seq_lengths": (7, 96, 1)}, 100, Shapes(96, (1, 7, 96))),
    ],
)
def test_shapes_of_a_model(settings: dict[str, Any], positions: int, expected: Shapes) -> None:
    assert resolve_shapes(ExportConfig(**settings), positions) == expected


@pytest.mark.parametrize(
    ("settings", "positions", "message"),
    [
        (
            {"context": 128},
            100,
            "--context 128 is longer than the 100 positions that the model was trained for; use "
            "96 or less.",
        ),
        ({}, 31, "The model has 31 positions; the KV cache needs 32 at least."),
        (
            {"context": 32, "seq_lengths": (1, 33)},
            100,
            "--seq-lengths holds 33, which is longer than the context of 32; drop it or raise "
            "--context.",
        ),
    ],
)
def test_shapes_that_do_not_fit_a_model(
    settings: dict[str, Any], positions: int, message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_shapes(ExportConfig(**settings), positions)
    assert str(caught.value) == message


def test_linear_scaling_gives_room_for_a_longer_context() -> None:
    spec = small_spec(rope_scaling={"type": "linear", "factor": 4.0})
    assert resolve(ExportConfig(), spec).shapes.context == 64
    assert resolve(ExportConfig(context=256), spec).shapes.context == 256
    with pytest.raises(ConfigError, match=r"longer than the 256 positions that .* use 256 or less"):
        resolve(ExportConfig(context=288), spec)


def test_a_cache_beyond_the_memory_is_refused_before_it_is_made() -> None:
    spec = small_spec(max_position_embeddings=2**31 - 1)
    with pytest.raises(ConfigError, match=r"needs 1,099\.5 GB for the cache alone"):
        resolve(ExportConfig(context=2**31 - 32), spec)


CONFIGS = st.builds(
    ExportConfig,
    bits=st.sampled_from([None, 1, 2, 3, 4, 6, 8, 16]),
    scheme=st.sampled_from([None, "codebook", "int4-group"]),
    group_size=st.integers(1, 256),
    zero_point=st.sampled_from(["none", "int", "float"]),
    codebook_rows=st.none() | st.integers(1, 64),
    codebook_columns=st.none() | st.integers(1, 64),
    codebook_vector=st.sampled_from([1, 2, 4]),
    codebook_scale=st.booleans(),
    embedding=st.sampled_from([None, "int8-channel", "codebook:4", "none"]),
    lm_head=st.sampled_from([None, "codebook:6"]),
    target=st.sampled_from(sorted(TARGETS)),
    minimum_os=st.sampled_from(sorted(MINIMUM_OS)),
    compute_precision=st.sampled_from(["fp16", "fp32"]),
    logits=st.sampled_from(["last", "all"]),
    context=st.none() | st.integers(1, 100).map(lambda n: 32 * n),
    seq_lengths=st.none()
    | st.sets(st.integers(2, 4096), max_size=5).map(lambda lengths: (1, *sorted(lengths))),
    backend=st.sampled_from(["coreml", "xnnpack"]),
    allow_inexact=st.booleans(),
    force=st.booleans(),
)
MIXED = st.one_of(
    st.builds(ExportConfig, bits=st.floats(1.01, 15.99).filter(lambda bits: not bits.is_integer())),
    st.builds(ExportConfig, size=st.integers(1, 10**12), embedding=st.just("codebook:4")),
    st.builds(ExportConfig, plan=st.just("manifest.json"), calibrate=st.just("bundled")),
)


@given(CONFIGS | MIXED)
def test_json_round_trip(config: ExportConfig) -> None:
    assert ExportConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


GIVEN = st.one_of(
    st.builds(lambda bits: {"bits": bits}, st.sampled_from([1, 3, 3.5, 4, 4.0, 8, 16])),
    st.builds(lambda size: {"size": size}, st.integers(1, 10**12)),
    st.builds(lambda name: {"scheme": name}, st.sampled_from(["codebook", "int4-group", "none"])),
    st.just({"plan": "other/manifest.json"}),
)


@given(CONFIGS.filter(lambda config: config.backend == "coreml") | MIXED, GIVEN)
def test_what_is_given_wins_over_a_recipe(recipe: ExportConfig, given: dict[str, Any]) -> None:
    config = recipe.under(given)
    (name,) = given
    assert getattr(config, name) == given[name]
    for other in ("target", "context", "rotate", "force", "calibrate"):
        assert getattr(config, other) == getattr(recipe, other)


@pytest.mark.parametrize(
    ("recipe", "given", "expected"),
    [
        ({"bits": 3}, {"size": 600}, {"size": 600}),
        ({"size": 600, "embedding": "none"}, {"bits": 3}, {"bits": 3, "embedding": "none"}),
        ({"plan": "p.json"}, {"bits": 3}, {"bits": 3}),
        ({"plan": "p.json"}, {"scheme": "mxfp4"}, {"scheme": "mxfp4"}),
        ({"bits": 3, "lm_head": "none", "group_size": 64}, {"plan": "p"}, {"plan": "p"}),
        ({"bits": 3.5}, {"scheme": "int4-group"}, {"scheme": "int4-group"}),
        ({"scheme": "int4-group"}, {"bits": 3.5}, {"bits": 3.5}),
        ({"scheme": "int4-group", "bits": 4}, {"bits": 3}, {"bits": 3}),
        ({"bits": 3}, {"scheme": "int8-channel"}, {"scheme": "int8-channel"}),
        # Kept, as they go together.
        ({"scheme": "codebook"}, {"bits": 3}, {"bits": 3, "scheme": "codebook"}),
        ({"bits": 4}, {"scheme": "int4-channel"}, {"bits": 4, "scheme": "int4-channel"}),
        ({"bits": 3}, {"context": 64}, {"bits": 3, "context": 64}),
        ({"bits": 3}, {}, {"bits": 3}),
    ],
    ids=str,
)
def test_a_recipe_gives_up_what_the_given_excludes(
    recipe: dict[str, Any], given: dict[str, Any], expected: dict[str, Any]
) -> None:
    assert ExportConfig(**recipe).under(given) == ExportConfig(**expected)


def test_contradictions_among_the_given_remain() -> None:
    with pytest.raises(ConfigError, match="--size decides what --bits 3 would; drop one of them"):
        ExportConfig(bits=3).under({"bits": 3, "size": 600})


def parse(words: list[str]) -> ExportConfig:
    """Read the flags of a command as the command line would."""
    kinds = {field.name: str(field.type) for field in fields(ExportConfig)}
    values: dict[str, Any] = {}
    rest = iter(words)
    for word in rest:
        name = word.removeprefix("--").replace("-", "_")
        if kinds[name] == "bool":
            values[name] = True
        elif kinds[name].startswith("tuple"):
            values[name] = tuple(int(part) for part in next(rest).split(","))
        else:
            text = next(rest)
            read = {"int": int, "float": float}.get(kinds[name].split()[0], str)
            values[name] = read(text)
    return ExportConfig(**values)


@given(CONFIGS | MIXED)
def test_the_rebuild_command_says_all_of_it(config: ExportConfig) -> None:
    words = rebuild_command(Source("hub", "org/name", "c0ffee"), config)
    assert words[:5] == ["llm-coreml", "export", "org/name", "--revision", "c0ffee"]
    assert all(isinstance(word, str) for word in words)
    assert parse(words[5:]) == config


def test_the_rebuild_command_leaves_defaults_out() -> None:
    source = Source("folder", "/home/me/m")  # nobody is told where it was
    assert rebuild_command(source, ExportConfig()) == ["llm-coreml", "export", "./m"]
    assert rebuild_command(Source("live", "m"), ExportConfig()) == []
    config = ExportConfig(bits=3, seq_lengths=(1, 16), force=True)
    assert rebuild_command(source, config)[3:] == [
        "--bits",
        "3",
        "--seq-lengths",
        "1,16",
        "--force",
    ]


def test_an_unknown_setting_offers_the_nearest() -> None:
    with pytest.raises(ConfigError) as caught:
        ExportConfig.from_json({"grop_size": 8})
    assert str(caught.value) == "There is no setting 'grop_size'. Did you mean 'group_size'?"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"weights": {"grop_size": 8}}, "weights has no key 'grop_size'. Did you mean 'group_siz"),
        ({"wieghts": {"bits": 3}}, "There is no key 'wieghts'. Did you mean 'weights'?"),
        ({"weights": {"context": 64}}, "weights has no key 'context'; it belongs to program."),
        ({"weights": {"bits": "three"}}, "weights.bits is 'three'; it must be a number or null."),
        ({"weights": {"force": 1}}, "weights has no key 'force'; it belongs to target."),
        ({"target": {"force": 1}}, "target.force is 1; it must be true or false."),
        ({"program": {"logits": "first"}}, "program.logits is 'first'; it must be last or all."),
        ({"weights": {}, "target": "ane"}, "target is 'ane'; it must be a section of keys and"),
        (
            {"program": {"seq_lengths": [1, "a"]}},
            "program.seq_lengths.1 is 'a'; it must be a whole",
        ),
        ({"program": {"seq_lengths": "1;8"}}, "'1;8' is no list of numbers such as 1,8,64, and"),
        ({"weights": {"size": "big"}}, "'big' is no number of bytes such as 4GB or 512MiB."),
        ({"bits": [4]}, "weights.bits is a list; it must be a number or null."),
        ({"weights": 3}, "weights is 3; it must be a section of keys and values."),
        ({"program": None}, "program is None; it must be a section of keys and values."),
    ],
    ids=str,
)
def test_json_that_is_no_config(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ExportConfig.from_json(values)
    assert str(caught.value).startswith(message)


def test_json_has_sections_and_earlier_manifests_have_none() -> None:
    config = ExportConfig(bits=3, target="ane", context=64, calibrate="bundled", seq_lengths=(1, 8))
    titles = ["source", "weights", "calibration", "program", "target", "engine"]
    assert list(config.to_json()) == titles
    assert config.to_json()["target"]["target"] == "ane"
    assert config.to_json()["program"]["seq_lengths"] == (1, 8)
    # As the first releases wrote it.
    flat = {name: value for part in config.to_json().values() for name, value in part.items()}
    assert ExportConfig.from_json(json.loads(json.dumps(flat))) == config
    assert ExportConfig.from_json({}) == ExportConfig()


def test_every_setting_is_in_one_section_and_says_what_it_is() -> None:
    found = [each for section in SECTIONS.values() for each in settings_of(section)]
    assert [each.name for each in found] == [field.name for field in fields(ExportConfig)]
    assert len({each.name for each in found}) == len(found)
    for each in found:
        assert each.about.endswith((".", "MB.")) and len(each.about) < 100, each.name
    jsonschema.Draft202012Validator.check_schema(sections_schema(SECTIONS))


def test_texts_are_read_where_the_command_line_reads_them() -> None:
    values = {"weights": {"size": "1.5MB"}, "program": {"seq_lengths": "1,8"}}
    assert ExportConfig.from_json(values) == ExportConfig(size=1_500_000, seq_lengths=(1, 8))


def test_a_job_has_everything_decided() -> None:
    config = ExportConfig(target="ane", minimum_os="macOS26", compute_precision="fp32", bits=3)
    job = resolve(config, SPEC)
    assert job.config is config and job.target is TARGETS["ane"] and job.opset == "iOS26"
    assert (job.precision.bits, job.precision.dtype) == (32, "float32")
    assert (job.attention, job.backend, job.logits) == ("decomposed", "coreml", "last")
    assert job.shapes == Shapes(96, (1, 8, 64))
    assert (job.weights.bits, job.calibration.calibrate, job.force) == (3, None, False)
    assert resolve(ExportConfig(), SPEC).attention == "fused"
    assert resolve(ExportConfig(backend="xnnpack"), SPEC).attention == "decomposed"
    with pytest.raises(ConfigError, match="--context 128 is longer than the 100 positions"):
        resolve(ExportConfig(context=128), SPEC)


def test_exit_codes_are_different() -> None:
    errors: list[type[LlmCoreMLError]] = [LlmCoreMLError, *LlmCoreMLError.__subclasses__()]
    codes = [error.exit_code for error in errors]
    assert sorted(codes) == list(range(1, 13))


def rows_of_the_document() -> list[str]:
    """Return the lines that `docs/export.md` has for the settings."""
    rows = []
    for title, section in SECTIONS.items():
        for each in settings_of(section):
            default = str(each.default).lower() if each.kind is bool else each.default
            shown = each.shown or ("" if default is None else f"`{default}`")
            rows.append(f"| {title} | `{each.name}` | {shown} | {each.about} |")
    return rows


def test_the_document_lists_every_setting_as_it_is() -> None:
    text = (Path(__file__).parent.parent / "docs" / "export.md").read_text()
    held = [line for line in text.splitlines() if re.match(rf"\| ({'|'.join(SECTIONS)}) \|", line)]
    rows = rows_of_the_document()
    assert held == rows, "\n" + "\n".join(rows)
