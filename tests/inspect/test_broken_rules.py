"""Which rules an artifact breaks, from its manifest alone."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from llm_coreml.bundle.manifest import Plan, Target
from llm_coreml.bundle.typed_json import read_record
from llm_coreml.cli.tables import contents_table
from llm_coreml.config import ExportConfig, resolve
from llm_coreml.errors import ArtifactError
from llm_coreml.inspect.broken_rules import BrokenRule, broken_rules
from llm_coreml.inspect.contents import Contents
from llm_coreml.quantize import make_plan
from llm_coreml.quantize.plan.plan_file import plan_json
from llm_coreml.rules import RULES, STATE_RULES
from tiny import small_spec

SPEC = small_spec()


def manifest(**settings: Any) -> tuple[Target, Plan]:
    """Return what a manifest says of target and formats."""
    job = resolve(ExportConfig(**settings), SPEC)
    target = Target("coreml", job.target.name, "", "", job.opset, "")
    return target, read_record(Plan, plan_json(make_plan(job, SPEC), SPEC, {}))


def test_what_was_forced_is_named_with_its_reason() -> None:
    found = broken_rules(*manifest(target="ane", scheme="int4-group", force=True))
    (rule,) = [rule for rule in RULES if rule.id == "ane-int4-group"]
    assert found == {
        "ane-int4-group": BrokenRule(
            level="error",
            reason=rule.reason,
            source="coremltools issue 2510",
            flag="--scheme codebook",
            matrices=14,
        )
    }
    contents = Contents("", None, 1, {}, {}, found)
    assert contents.to_json()["rules"]["ane-int4-group"]["matrices"] == 14
    table = contents_table(contents)
    console = Console(width=400)
    with console.capture() as captured:
        console.print(table)
    row = r"^ane-int4-group +14 matrices: the Neural Engine takes .*; give --scheme codebook$"
    assert re.search(row, captured.get(), re.M)
    tables = manifest(target="ane", embedding="int8-group", force=True)
    assert broken_rules(*tables)["ane-int8-group"].matrices == 2
    told = broken_rules(*tables)["ane-int8-group"].flag
    assert told == "--embedding int8-channel --lm-head int8-channel"


WIDE, NARROW = (2, 2, 64, 64), (2, 2, 64, 20)


def test_states_that_the_neural_engine_refuses_are_told() -> None:
    target, plan = manifest(target="ane")
    found = broken_rules(target, plan, [[NARROW, NARROW]])
    assert found == {
        "ane-state-width": BrokenRule(
            level="warning",
            reason=STATE_RULES[0].reason,
            source="coremltools issue 2631",
            flag="--pad-heads or --target gpu",
            matrices=0,
        )
    }
    console = Console(width=400)
    with console.capture() as captured:
        console.print(contents_table(Contents("", None, 1, {}, {}, found)))
    assert re.search(
        r"^ane-state-width +the Neural Engine's .*; give --pad-heads or --target gpu$",
        captured.get(),
        re.M,
    )
    assert broken_rules(target, plan, [[WIDE, WIDE]]) == {}
    assert list(broken_rules(target, plan, [4 * [WIDE]])) == ["ane-many-states"]
    assert broken_rules(target, plan, 2 * [[WIDE, WIDE]]) == {}, "partitions with two states each"
    assert list(broken_rules(target, plan, [[(2, 2, 16416, 64)]])) == ["ane-long-states"]
    assert list(broken_rules(target, None, [[NARROW]])) == ["ane-state-width"], (
        "of the first releases"
    )
    for other in ("gpu", "cpu"):
        assert broken_rules(replace(target, name=other), plan, [[NARROW]]) == {}
    assert broken_rules(replace(target, backend="xnnpack"), plan, [[NARROW]]) == {}


def test_what_breaks_no_rule() -> None:
    assert broken_rules(*manifest(scheme="int4-group")) == {}
    assert broken_rules(*manifest(target="ane")) == {}
    target, plan = manifest(target="ane", scheme="int4-group", force=True)
    twin = replace(target, backend="xnnpack")
    assert broken_rules(twin, plan) == {}, "it stores dequantized weights"
    assert broken_rules(target, None) == {}, "an early manifest has no plan"


def test_a_manifest_with_another_format_is_damaged() -> None:
    target, plan = manifest()
    odd = replace(plan.matrices["lm_head"], scheme={"type": "Odd"})
    with pytest.raises(ArtifactError, match="The manifest cannot be understood: there is no"):
        broken_rules(target, Plan({**plan.matrices, "lm_head": odd}))
    with pytest.raises(ArtifactError, match="There is no target 'tpu'"):
        broken_rules(replace(target, name="tpu"), plan)
