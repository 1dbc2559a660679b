"""Plans as files: read back as they were written, and refused where they do not fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_coreml.config import ExportConfig, resolve
from llm_coreml.decoder.spec import NormSpec
from llm_coreml.errors import ConfigError, UnsupportedError
from llm_coreml.quantize import QuantizationPlan, make_plan
from llm_coreml.quantize.formats.schemes import (
    CODEBOOK_BITS,
    Codebook,
    IntChannel,
    IntGroup,
    Scheme,
    Unquantized,
)
from llm_coreml.quantize.plan import plan_file
from llm_coreml.quantize.plan.plan import matrices
from llm_coreml.quantize.plan.plan_file import parse_plan, plan_json, read_plan
from tiny import small_spec

SPEC = small_spec(intermediate_size=96, tie_word_embeddings=True)
JOB = resolve(ExportConfig(), SPEC)
SCHEMES = (Codebook(2, 8), IntGroup(4, 16), IntChannel(8), IntChannel(4), Unquantized(16))
DOWN = "layers.1.mlp.down_proj"


def plan_of_all_schemes() -> QuantizationPlan:
    chosen: dict[str, Scheme] = {
        name: SCHEMES[at % len(SCHEMES)] for at, (name, _) in enumerate(matrices(SPEC))
    }
    return make_plan(
        resolve(ExportConfig(embedding="int4-channel", lm_head="none"), SPEC), SPEC, chosen
    )


GOOD = json.dumps(plan_json(plan_of_all_schemes(), SPEC, {}))


def good() -> dict[str, Any]:
    """Return a plan as a manifest holds it."""
    found: dict[str, Any] = json.loads(GOOD)
    return found


def test_a_plan_is_read_back_as_it_was() -> None:
    plan = plan_of_all_schemes()
    assert plan.embedding == IntChannel(4) and plan.lm_head == Unquantized(16) and not plan.tied
    assert make_plan(JOB, SPEC, parse_plan(good(), JOB, SPEC)) == plan
    for name, scheme in ((DOWN, plan.scheme_of(DOWN)), ("embed_tokens", IntChannel(4))):
        assert good()["matrices"][name]["scheme"]["bits"] == scheme.bits


def test_a_plan_of_one_scheme_is_the_plan_of_the_flags() -> None:
    plain = make_plan(resolve(ExportConfig(bits=3), SPEC), SPEC)
    assert make_plan(JOB, SPEC, parse_plan(plan_json(plain, SPEC, {}), JOB, SPEC)) == plain


def test_bytes_and_losses_are_told() -> None:
    (entry,) = (plan_json(plan_of_all_schemes(), SPEC, {DOWN: 0.5})["matrices"][DOWN],)
    assert entry["shape"] == [64, 96] and entry["kl"] == 0.5
    scheme = plan_of_all_schemes().scheme_of(DOWN)
    assert entry["bytes"] == round(scheme.bits_per_weight((64, 96)) * 64 * 96 / 8)
    assert "kl" not in good()["matrices"][DOWN]


def scheme_of_down(**changes: Any) -> Callable[[dict[str, Any]], None]:
    def change(plan: dict[str, Any]) -> None:
        fields = {"type": "Codebook", **asdict(Codebook(3, 16)), **changes}
        plan["matrices"][DOWN]["scheme"] = {k: v for k, v in fields.items() if v != "absent"}

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.pop("matrices"), "there is no plan in it; give the manifest.json of an"),
        (lambda p: p.update(matrices=[1]), "there is no plan in it; give the manifest.json of an"),
        (
            lambda p: p["matrices"].update({"layers.2.mlp.down_proj": {}}),
            "the model has no matrix 'layers.2.mlp.down_proj'; the plan is another model's.",
        ),
        (
            lambda p: p["matrices"].update({"layers.0.mlp.dwn_proj": {}}),
            "no matrix 'layers.0.mlp.dwn_proj'; the plan is another model's. Did you mean "
            "'layers.0.mlp.down_proj'?",
        ),
        (lambda p: p["matrices"].update({"\x1b[2J": {}}), r"no matrix '\x1b[2J'"),
        (lambda p: p["matrices"].pop(DOWN), f"it lacks {DOWN}; give every matrix"),
        (lambda p: p["matrices"].clear(), "it lacks layers.0.self_attn.q_proj and 15 more; give"),
        (lambda p: p["matrices"].update({DOWN: 3}), f"{DOWN} is [64, 96] in the model, not 3;"),
        (
            lambda p: p["matrices"][DOWN].update(shape=[64, 128]),
            f"{DOWN} is [64, 96] in the model, not [64, 128]; the plan is another model's.",
        ),
        (lambda p: p["matrices"][DOWN].pop("shape"), "in the model, not None; the plan is"),
        (lambda p: p["matrices"][DOWN].pop("scheme"), f"{DOWN}: there is no scheme None; the"),
        (
            scheme_of_down(type="Codebok"),
            "no scheme 'Codebok'; the schemes are Codebook, IntGroup, "
            "IntChannel, Mxfp4, TableGroup, Unquantized. Did you mean 'Codebook'?",
        ),
        (scheme_of_down(type=["Codebook"]), "there is no scheme ['Codebook']; the schemes are"),
        (scheme_of_down(type="Scheme"), "there is no scheme 'Scheme'; the schemes are"),
        (scheme_of_down(rows="absent"), "a Codebook has the fields bits, rows, scale_bits"),
        (scheme_of_down(extra=1), "a Codebook has the fields bits, rows, scale_bits"),
        (scheme_of_down(bits=5), "a Codebook has 1, 2, 3, 4, 6, 8 bits, not 5."),
        (scheme_of_down(bits=10**30), "a Codebook has 1, 2, 3, 4, 6, 8 bits, not 1000"),
        (scheme_of_down(bits="3"), "bits of a Codebook is '3', which it cannot be."),
        (scheme_of_down(bits=3.0), "bits of a Codebook is 3.0, which it cannot be."),
        (scheme_of_down(bits=True), "bits of a Codebook is True, which it cannot be."),
        (scheme_of_down(rows=0), f"{DOWN}: --codebook-rows is 0; it must be at least 1."),
        (scheme_of_down(rows=48), f"{DOWN} has 64 rows, which --codebook-rows 48 does not divide"),
        (
            scheme_of_down(scale_bits=32),
            f"{DOWN} holds fp32 numbers, and --compute-precision is fp16; give the precision",
        ),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(
    change: Callable[[dict[str, Any]], Any], message: str, tmp_path: Path
) -> None:
    plan = good()
    change(plan)
    with pytest.raises(ConfigError) as caught:
        parse_plan(plan, JOB, SPEC)
    assert message in str(caught.value)
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(plan))
    with pytest.raises(ConfigError) as caught:
        read_plan(file, JOB, SPEC)
    assert str(caught.value).startswith(f"--plan '{file}': ") and message in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read: Expecting value"),
        (b"\xff\xfe", "cannot be read: "),
        (b"[" * 200_000, "cannot be read: "),
        (b"[]", "there is no plan in it; give the manifest.json of an export."),
        (b'{"quantization": {}}', "there is no plan in it; give the manifest.json of an export."),
        (b'{"quantization": 3, "matrices": 4}', "there is no plan in it"),
    ],
)
def test_a_file_that_is_no_plan_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    file.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read_plan(file, JOB, SPEC)
    assert message in str(caught.value)


def test_files_that_are_absent_or_endless_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"cannot be read: .*No such file"):
        read_plan(tmp_path / "absent", JOB, SPEC)
    with pytest.raises(ConfigError, match="cannot be read: "):
        read_plan(tmp_path, JOB, SPEC)
    monkeypatch.setattr(plan_file, "_LARGEST_FILE", 1 << 10)
    (tmp_path / "long.json").write_text(json.dumps(good()))
    with pytest.raises(ConfigError, match="cannot be read: it is larger than"):
        read_plan(tmp_path / "long.json", JOB, SPEC)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=5,
)


@settings(max_examples=50)
@given(st.sampled_from(["matrix", "scheme", "field"]), JSON)
def test_whatever_stands_in_a_plan_is_refused_in_a_sentence(where: str, value: Any) -> None:
    plan = good()
    if where == "matrix":
        plan["matrices"][DOWN] = value
    elif where == "scheme":
        plan["matrices"][DOWN]["scheme"] = value
    else:
        scheme_of_down(bits=value)(plan)
    if where == "field" and type(value) is int and value in CODEBOOK_BITS:
        return
    with pytest.raises(ConfigError):
        parse_plan(plan, JOB, SPEC)


def test_what_the_target_refuses_is_refused_in_a_plan_too() -> None:
    chosen = parse_plan(good(), JOB, SPEC)
    with pytest.raises(
        UnsupportedError, match=r"--target ane does not take int4-group.*Use a --plan with"
    ):
        make_plan(resolve(ExportConfig(target="ane"), SPEC), SPEC, chosen)
    forced = make_plan(resolve(ExportConfig(target="ane", force=True), SPEC), SPEC, chosen)
    assert forced == plan_of_all_schemes()


def test_calibration_wants_codes_everywhere() -> None:
    with pytest.raises(ConfigError, match="unquantized linear layers have none"):
        make_plan(
            resolve(ExportConfig(calibrate="bundled"), SPEC), SPEC, parse_plan(good(), JOB, SPEC)
        )


def test_a_plan_fits_other_models_of_the_same_sizes_only() -> None:
    fine_tuned = replace(SPEC, norm=NormSpec(1e-4))
    assert parse_plan(good(), JOB, fine_tuned) == parse_plan(good(), JOB, SPEC)
    with pytest.raises(ConfigError, match=r"embed_tokens is \[1001, 64\] in the model"):
        parse_plan(good(), JOB, replace(SPEC, vocab_size=1001))
    with pytest.raises(ConfigError, match=r"no matrix 'layers\.1\.\S+'; the plan is another"):
        parse_plan(good(), JOB, replace(SPEC, layers=SPEC.layers[:1]))


def test_tables_of_an_import_are_not_for_others(tmp_path: Path) -> None:
    plan = good()
    scheme = {"type": "TableGroup", "bits": 4, "group_size": 32, "scale_bits": 16}
    plan["matrices"][DOWN]["scheme"] = scheme
    assert parse_plan(plan, JOB, SPEC)[DOWN].bits == 4
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan))
    with pytest.raises(ConfigError, match="only a quantized checkpoint holds"):
        read_plan(path, JOB, SPEC)
    scheme["group_size"] = 0
    with pytest.raises(ConfigError, match="it must be at least 1"):
        parse_plan(plan, JOB, SPEC)
