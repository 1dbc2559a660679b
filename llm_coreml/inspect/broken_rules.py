"""Which rules an artifact breaks: what an export with `--force` passed over, or was warned of.

broken_rules(manifest.target, manifest.quantization.plan)["ane-int4-group"].matrices
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llm_coreml.bundle.manifest import Plan, Target
from llm_coreml.errors import ArtifactError, LlmCoreMLError
from llm_coreml.quantize.formats.scheme_json import scheme_from_json
from llm_coreml.rules import Rule, Use, broken, broken_by_states, remedy
from llm_coreml.targets import BACKENDS, get_target

# What chooses the formats of the tables; --scheme chooses those of the blocks.
_FLAGS = {"embed_tokens": "--embedding", "lm_head": "--lm-head"}


@dataclass(frozen=True)
class BrokenRule:
    """A rule that an artifact breaks, see `Rule`.

    Attributes:
        level: `error` or `warning`.
        reason: What happens.
        source: The public report.
        flag: What mends it on the command line.
        matrices: How many matrices break it; none do where it is about states.
    """

    level: str
    reason: str
    source: str
    flag: str
    matrices: int


def broken_rules(
    target: Target, plan: Plan | None, states: Sequence[Sequence[Sequence[int]]] = ()
) -> dict[str, BrokenRule]:
    """Return the rules that the formats and states of a manifest break on its target, by name.

    Manifests of the first releases record no plan, and a twin holds no formats.

    Args:
        target: Where the program is to run.
        plan: The formats of its matrices.
        states: Shapes of what each of its programs remembers.

    Raises:
        ArtifactError: there is no such target or format.
    """
    if not BACKENDS[target.backend].has_targets:
        return {}
    matrices = {} if plan is None else plan.matrices
    try:
        unit = get_target(target.name)
        schemes = {name: scheme_from_json(held.scheme) for name, held in matrices.items()}
    except LlmCoreMLError as error:
        raise ArtifactError(f"The manifest cannot be understood: {error}") from None
    uses = [
        Use(unit, target.opset, scheme.traits, scheme.minimum_os, _FLAGS.get(name, "--scheme"))
        for name, scheme in schemes.items()
    ]
    breaking: dict[Rule, list[Use]] = {}
    for use in uses:
        for rule in broken(use):
            breaking.setdefault(rule, []).append(use)
    found = {
        rule.id: BrokenRule(rule.level, rule.reason, rule.source, remedy(rule, uses), len(uses))
        for rule, uses in breaking.items()
    }
    return found | {
        rule.id: BrokenRule("warning", rule.reason, rule.source, rule.instead, 0)
        for rule in broken_by_states(unit, states)
    }
