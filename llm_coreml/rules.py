"""What is known not to work: one record each, with its reason and where that was reported.

    use = Use(target, "iOS18", ("int4-group",), "iOS18", "--embedding")
    for rule in broken(use):
        rule.id, rule.reason, rule.source, remedy(rule, [use])
    for rule in broken_by_states(target, [(2, 8, 2048, 100)]):
        rule.id, rule.sentence

The plan refuses what breaks a rule; `llm-coreml show` names the rules that an artifact breaks.
Facts about hardware come from public reports; this project has no Apple device and has measured
none of them.

Adding a rule: one record in `RULES`, or in `STATE_RULES` for what a program remembers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from llm_coreml.targets import Target


@dataclass(frozen=True)
class Use:
    """A weight format on a target.

    Attributes:
        target: Where it is to run.
        opset: What the oldest system brings, `iOS16` to `iOS26`.
        traits: What a target may not take, see `Scheme.traits`; the format's name is the first.
        minimum_os: Oldest system whose Core ML runs the format.
        flag: What chooses the format: `--scheme`, `--embedding`, `--lm-head` or `--plan`; of a
            pattern with it, `--scheme lm_head=`.
    """

    target: Target
    opset: str
    traits: tuple[str, ...]
    minimum_os: str
    flag: str = "--scheme"


@dataclass(frozen=True)
class Rule:
    """Something that is known not to work.

    Attributes:
        id: Short name.
        level: An `error` is refused unless `--force` is given; a `warning` is only told of.
        reason: What happens, without a full stop.
        source: The public report.
        instead: A format that keeps the rule.
        check: Whether a use breaks the rule.
        setting: What else mends it on the command line; empty if nothing does.
        told: What is said of a use that breaks it.
    """

    id: str
    level: Literal["error", "warning"]
    reason: str
    source: str
    instead: str
    check: Callable[[Use], bool]
    setting: str = ""
    told: str = "--target {target} does not take {format}: {why}"

    @property
    def sentence(self) -> str:
        """The reason and its source."""
        return f"{self.reason} ({self.source})"

    def refusal(self, use: Use, system: str) -> str:
        """Return what is said of a use that breaks it, without a full stop.

        Args:
            use: What breaks it.
            system: The oldest system, as it was given.
        """
        return self.told.format(
            target=use.target.name,
            format=use.traits[0],
            why=self.sentence,
            system=system,
            needed=use.minimum_os,
        )


def _on_the_neural_engine(trait: str) -> Callable[[Use], bool]:
    return lambda use: use.target.neural_engine and trait in use.traits


# The first system with integers of 4 bits, and what those before it have.
_INT4_SYSTEM, _BEFORE_INT4 = "iOS18", "int8-channel"
TOO_OLD = Rule(
    "system-too-old",
    "error",
    "Core ML runs the format on later systems only",
    "coremltools, pass canonicalize_quantized_lut_pattern",
    "int4-channel",
    # All have two digits, so that they stand in the order of the alphabet.
    lambda use: use.opset < use.minimum_os,
    setting="--minimum-os {needed}",
    told="{system} is too old for {format}, which Core ML runs from {needed} on",
)
RULES = (
    Rule(
        "ane-int4-group",
        "error",
        "the Neural Engine takes per-channel and palettized weights only and has been reported to "
        "fall back or compute wrong values with per-block int4",
        "coremltools issue 2510",
        "codebook",
        _on_the_neural_engine("int4-group"),
    ),
    Rule(
        "ane-int8-group",
        "error",
        "the Neural Engine has been reported to compute wrong values with per-block int8, without "
        "an error",
        "coreai-models issue 279",
        "int8-channel",
        _on_the_neural_engine("int8-group"),
    ),
    Rule(
        "ane-scaled-table",
        "error",
        "the Neural Engine's compiler has been reported to abort on a scale of what a table gives",
        "coremltools pull request 2688",
        "codebook",
        _on_the_neural_engine("scaled table"),
    ),
    TOO_OLD,
)


@dataclass(frozen=True)
class StateRule:
    """What is known not to work of the states of a program; all of them are told, none refused.

    Attributes:
        id: Short name.
        reason: What happens, without a full stop.
        source: The public report.
        instead: What mends it on the command line.
        check: Whether a program with states of these shapes breaks the rule.
    """

    id: str
    reason: str
    source: str
    instead: str
    check: Callable[[Sequence[Sequence[int]]], bool]

    @property
    def sentence(self) -> str:
        """The reason and its source."""
        return f"{self.reason} ({self.source})"


STATE_RULES = (
    StateRule(
        "ane-state-width",
        "the Neural Engine's compiler has been reported to refuse states whose width, which is "
        "the model's head_dim, is no multiple of 32",
        "coremltools issue 2631",
        "--pad-heads or --target gpu",
        lambda shapes: any(shape[-1] % 32 for shape in shapes),
    ),
    StateRule(
        "ane-many-states",
        "programs with more than two states have been reported to compile for the Neural Engine, "
        "and to fail when they run",
        "CoreML-LLM, docs on MLState",
        "--target gpu",
        lambda shapes: len(shapes) > 2,
    ),
    StateRule(
        "ane-long-states",
        "no dimension over 16,384 has been found to be taken by the Neural Engine, which is the "
        "positions of a state here",
        "ANEMLL; coremlmodels",
        "--context 16384 or --target gpu",
        lambda shapes: any(max(shape) > 16384 for shape in shapes),
    ),
)


# Of the last op of a program, told where it is asked for.
ARGMAX = (
    "the largest of floats has been reported at a wrong place on devices of iOS 27, where the "
    "likeliest by topk was right (coreai-torch issue 116)"
)


def broken_by_states(
    target: Target, programs: Sequence[Sequence[Sequence[int]]]
) -> list[StateRule]:
    """Return the rules that programs with states of these shapes break on a target."""
    if not target.neural_engine:
        return []
    return [rule for rule in STATE_RULES if any(rule.check(shapes) for shapes in programs)]


def broken(use: Use) -> list[Rule]:
    """Return the rules that a use breaks."""
    return [rule for rule in RULES if rule.check(use)]


def refused(use: Use) -> list[Rule]:
    """Return the rules that a use breaks and that only `--force` passes over."""
    return [rule for rule in broken(use) if rule.level == "error"]


def remedy(rule: Rule, uses: Iterable[Use]) -> str:
    """Return what mends uses that break a rule, as words of the command line."""
    uses = list(uses)
    settings = dict.fromkeys(rule.setting.format(needed=use.minimum_os) for use in uses)
    formats = dict.fromkeys(_other_format(rule, use) for use in uses)
    return " or ".join([*filter(None, settings), " ".join(formats)])


def _other_format(rule: Rule, use: Use) -> str:
    instead = rule.instead if use.opset >= _INT4_SYSTEM else _BEFORE_INT4
    if use.flag == "--plan":
        return f"a --plan with plain {instead} instead"
    if use.flag.endswith("="):
        return f"{use.flag}{instead}"
    # Of the format that would keep the rule, only an option breaks it.
    same = use.traits[0] == instead
    return "--no-codebook-scale" if same else f"{use.flag} {instead}"
