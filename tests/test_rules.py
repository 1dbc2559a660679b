"""Rules: what each of them refuses, that it says why, and that it can fail."""

from __future__ import annotations

import pytest

from llm_coreml import rules
from llm_coreml.quantize.formats.schemes import (
    SCHEMES,
    Codebook,
    IntChannel,
    IntGroup,
    Mxfp4,
    Scheme,
    TableGroup,
)
from llm_coreml.rules import RULES, STATE_RULES, TOO_OLD, Rule, Use, broken, refused, remedy
from llm_coreml.targets import TARGETS

NEW, OLD = "iOS26", "iOS18"


def broken_by(scheme: Scheme, target: str, opset: str = NEW) -> list[str]:
    use = Use(TARGETS[target], opset, scheme.traits, scheme.minimum_os)
    return [rule.id for rule in broken(use)]


@pytest.mark.parametrize(
    ("scheme", "expected"),
    [
        (IntGroup(4), ["ane-int4-group"]),
        (IntGroup(8), ["ane-int8-group"]),
        (IntGroup(3), ["ane-scaled-table"]),
        (Mxfp4(), ["ane-scaled-table"]),
        (TableGroup(), ["ane-scaled-table"]),
        (Codebook(4, row_scale=True), ["ane-scaled-table"]),
        (Codebook(4), []),
        (IntChannel(4), []),
    ],
    ids=lambda value: value.label if isinstance(value, Scheme) else None,
)
def test_the_neural_engine_refuses_what_was_reported(scheme: Scheme, expected: list[str]) -> None:
    assert broken_by(scheme, "ane") == broken_by(scheme, "all") == expected
    assert broken_by(scheme, "gpu") == broken_by(scheme, "cpu") == []


def test_formats_of_later_systems_are_refused_on_every_target() -> None:
    for target in ("gpu", "cpu"):
        assert broken_by(IntGroup(3), target, OLD) == ["system-too-old"]
    assert broken_by(IntGroup(3), "ane", OLD) == ["ane-scaled-table", "system-too-old"]
    assert broken_by(IntGroup(4), "gpu", OLD) == []


def test_formats_that_older_systems_have_are_named_with_their_flag() -> None:
    target = TARGETS["gpu"]
    for scheme, needed in ((IntGroup(4), "iOS18"), (Codebook(4, rows=16), "iOS18")):
        for opset in ("iOS16", "iOS17"):
            use = Use(target, opset, scheme.traits, scheme.minimum_os, "--embedding")
            assert broken(use) == [TOO_OLD]
            told = f"--minimum-os {needed} or --embedding int8-channel"
            assert remedy(TOO_OLD, [use]) == told
    for scheme in (IntChannel(8), Codebook(4, rows=None), Codebook(6, rows=None)):
        assert broken(Use(target, "iOS16", scheme.traits, scheme.minimum_os)) == []


def test_every_rule_has_a_name_a_reason_and_a_public_source() -> None:
    assert len({rule.id for rule in (*RULES, *STATE_RULES)}) == len(RULES) + len(STATE_RULES)
    for each in STATE_RULES:
        assert each.id == each.id.lower() and each.instead.startswith("--")
        assert not each.reason.endswith(".") and each.sentence == f"{each.reason} ({each.source})"
    for rule in RULES:
        assert rule.id == rule.id.lower() and " " not in rule.id
        assert rule.reason and not rule.reason.endswith(".") and rule.source
        use = Use(TARGETS["ane"], OLD, ("any",), NEW, "--embedding")
        assert remedy(rule, [use]).startswith("--")
        # What is to be used instead breaks no rule, anywhere.
        assert all(not refused(Use(t, OLD, (rule.instead,), OLD)) for t in TARGETS.values())
        assert rule.instead in SCHEMES
        assert rule.sentence == f"{rule.reason} ({rule.source})"


def test_warnings_are_told_and_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    use = Use(TARGETS["gpu"], OLD, ("codebook",), OLD)
    rule = Rule("odd", "warning", "it is odd", "a report", "codebook", lambda _: True)
    monkeypatch.setattr(rules, "RULES", (rule,))
    assert broken(use) == [rule] and refused(use) == []


def test_remedies_name_the_flag_that_chose_the_format() -> None:
    (rule,) = [rule for rule in RULES if rule.id == "ane-scaled-table"]

    def use(flag: str, name: str = "mxfp4") -> Use:
        return Use(TARGETS["ane"], OLD, (name, "scaled table"), NEW, flag)

    for flag in ("--scheme", "--embedding", "--lm-head"):
        assert remedy(rule, [use(flag)]) == f"{flag} codebook"
        assert remedy(TOO_OLD, [use(flag)]) == f"--minimum-os iOS26 or {flag} int4-channel"
        assert remedy(rule, [use(flag, "codebook")]) == "--no-codebook-scale"
    assert remedy(rule, [use("--plan")]) == "a --plan with plain codebook instead"
    several = [use("--scheme"), use("--embedding"), use("--scheme")]
    assert remedy(rule, several) == "--scheme codebook --embedding codebook"
