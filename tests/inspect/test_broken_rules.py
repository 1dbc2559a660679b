"""Which rules an artifact breaks, from its manifest alone."""

from __future__ import annotations

from typing import Any

import pytest
from rich.console import Console

from llm_coreml.cli.tables import contents_table
from llm_coreml.config import ExportConfig, resolve
from llm_coreml.errors import ArtifactError
from llm_coreml.inspect.broken_rules import broken_rules
from llm_coreml.quantize import make_plan
from llm_coreml.quantize.plan.plan_file import plan_json
from llm_coreml.rules import RULES
from tiny import small_spec

SPEC = small_spec()


def manifest(**settings: Any) -> dict[str, Any]:
    """Return what a manifest says of formats and target."""
    job = resolve(ExportConfig(**settings), SPEC)
    return {
        "target": {"backend": "coreml", "name": job.target.name, "opset": job.opset},
        "quantization": {"plan": plan_json(make_plan(job, SPEC), SPEC, {})},
    }


def test_what_was_forced_is_named_with_its_reason() -> None:
    found = broken_rules(manifest(target="ane", scheme="int4-group", force=True))
    (rule,) = [rule for rule in RULES if rule.id == "ane-int4-group"]
    assert found == {
        "ane-int4-group": {
            "level": "error",
            "reason": rule.reason,
            "source": "coremltools issue 2510",
            "flag": "--scheme codebook",
            "matrices": 14,
        }
    }
    table = contents_table({"rules": found, "constant_methods": {}, "methods": {}, "bytes": 1})
    console = Console(width=400)
    with console.capture() as captured:
        console.print(table)
    assert "ane-int4-group  14 matrices: the Neural Engine takes" in captured.get()
    tables = manifest(target="ane", embedding="int8-group", force=True)
    assert broken_rules(tables)["ane-int8-group"]["matrices"] == 2


def test_what_breaks_no_rule() -> None:
    assert broken_rules(manifest(scheme="int4-group")) == {}
    assert broken_rules(manifest(target="ane")) == {}
    forced = manifest(target="ane", scheme="int4-group", force=True)
    twin = {**forced, "target": {**forced["target"], "backend": "xnnpack"}}
    assert broken_rules(twin) == {}, "it stores dequantized weights"
    assert broken_rules({**forced, "quantization": {}}) == {}, "an early manifest has no plan"


def test_a_manifest_with_another_format_is_damaged() -> None:
    damaged = manifest()
    damaged["quantization"]["plan"]["matrices"]["lm_head"]["scheme"] = {"type": "Odd"}
    with pytest.raises(ArtifactError, match="The manifest cannot be understood: there is no"):
        broken_rules(damaged)
    damaged = manifest()
    damaged["target"]["name"] = "tpu"
    with pytest.raises(ArtifactError, match="There is no target 'tpu'"):
        broken_rules(damaged)
