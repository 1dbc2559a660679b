"""Which rules an artifact breaks: what an export with `--force` passed over.

broken_rules(bundle.manifest)["ane-int4-group"]["matrices"]
"""

from __future__ import annotations

from typing import Any

from llm_coreml.errors import ArtifactError, LlmCoreMLError
from llm_coreml.quantize.plan.plan_file import scheme_from_json
from llm_coreml.rules import Use, broken
from llm_coreml.targets import get_target


def broken_rules(manifest: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the rules that the formats of a manifest break on its target, by name.

    Each comes with its level, reason, source, the flag that mends it, and how many matrices break
    it. Manifests of the first releases record no plan, and a twin holds no formats.

    Raises:
        ArtifactError: there is no such target or format.
    """
    target, plan = manifest["target"], manifest["quantization"].get("plan")
    if plan is None or target["backend"] != "coreml":
        return {}
    found: dict[str, dict[str, Any]] = {}
    try:
        unit = get_target(target["name"])
        schemes = [scheme_from_json(matrix["scheme"]) for matrix in plan["matrices"].values()]
    except LlmCoreMLError as error:
        raise ArtifactError(f"The manifest cannot be understood: {error}") from None
    for scheme in schemes:
        for rule in broken(Use(unit, target["opset"], scheme.traits, scheme.minimum_os)):
            told = {
                "level": rule.level,
                "reason": rule.reason,
                "source": rule.source,
                "flag": rule.flag,
                "matrices": 0,
            }
            found.setdefault(rule.id, told)["matrices"] += 1
    return found
