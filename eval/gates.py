"""Gates: what an evaluation must hold to, and a sentence about each that it does not.

gates = Gates(max_perplexity=12.5, max_kl=0.05)
verdicts = judge(gates, result.to_json())
raise_failures(verdicts)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from llm_coreml.errors import ConfigError, GateError, UnmeasuredError
from llm_coreml.eval.compared import FIGURES, Document, Figure, difference, paired

State = Literal["held", "failed", "unmeasured"]

_BY_NAME = {figure.name: figure for figure in FIGURES}
# What a baseline is held against: the figures that do not depend on the machine.
_REGRESSING = ("perplexity", "mean_kl", "top1_agreement", "program_bytes")
_DIVERGENCES = ("mean_kl", "top1_agreement")


@dataclass(frozen=True)
class Gates:
    """What is asked of an evaluation; None asks for nothing.

    Attributes:
        max_perplexity: Largest perplexity per token.
        max_kl: Largest mean KL from the original, in nats per token.
        min_top1: Least share of tokens with the original's most likely token, 0 to 1.
        max_bytes: Most bytes of the program and its weights.
        baseline: An earlier result that it must not be worse than.
        max_regression: By which share it may be worse than that.

    Raises:
        ConfigError: a value out of range.
    """

    max_perplexity: float | None = None
    max_kl: float | None = None
    min_top1: float | None = None
    max_bytes: int | None = None
    baseline: Document | None = None
    max_regression: float = 0.01

    def __post_init__(self) -> None:
        """Check every value."""
        ranges = {
            "--max-perplexity": (self.max_perplexity, 1.0, math.inf),
            "--max-kl": (self.max_kl, 0.0, math.inf),
            "--min-top1": (self.min_top1, 0.0, 1.0),
            "--max-bytes": (self.max_bytes, 1, math.inf),
            "--max-regression": (self.max_regression, 0.0, math.inf),
        }
        for flag, (value, low, high) in ranges.items():
            if value is not None and not (low <= value <= high and math.isfinite(value)):
                above = f"{low:g} to {high:g}" if math.isfinite(high) else f"{low:g} or more"
                raise ConfigError(f"{flag} is {value:g}; it must be finite, {above}.")

    @property
    def any(self) -> bool:
        """Whether anything is asked."""
        asked = (self.max_perplexity, self.max_kl, self.min_top1, self.max_bytes, self.baseline)
        return any(each is not None for each in asked)

    def check_measured(self, artifact_only: bool) -> None:
        """Refuse gates that an evaluation without the original cannot answer, before it is made.

        Raises:
            UnmeasuredError: as said.
        """
        if artifact_only and (self.max_kl is not None or self.min_top1 is not None):
            flag = "--max-kl" if self.max_kl is not None else "--min-top1"
            raise UnmeasuredError(
                f"{flag} compares with the original, which --artifact-only leaves out; leave one "
                "of the two out."
            )


@dataclass(frozen=True)
class Verdict:
    """What became of a gate.

    Attributes:
        gate: Its name, `max-perplexity`.
        state: Whether it holds, or nobody knows.
        text: The figure beside what was asked, as a clause.
    """

    gate: str
    state: State
    text: str


def judge(gates: Gates, document: Document) -> tuple[Verdict, ...]:
    """Hold an evaluation against gates.

    Args:
        gates: What is asked.
        document: The evaluation, as `results.json` holds it.
    """
    asked = (
        ("perplexity", "max-perplexity", gates.max_perplexity),
        ("mean_kl", "max-kl", gates.max_kl),
        ("top1_agreement", "min-top1", gates.min_top1),
        ("program_bytes", "max-bytes", gates.max_bytes),
    )
    verdicts = [
        _limited(_BY_NAME[name], gate, float(limit), document)
        for name, gate, limit in asked
        if limit is not None
    ]
    if gates.baseline is not None:
        verdicts += _regressions(gates.baseline, gates.max_regression, document)
    return tuple(verdicts)


def raise_failures(verdicts: Sequence[Verdict]) -> None:
    """Raise if a gate does not hold.

    Raises:
        GateError: one is failed; the sentence says by how much.
        UnmeasuredError: none is failed, and one asks for what was not measured.
    """
    for state, kind, words in (
        ("failed", GateError, "not held"),
        ("unmeasured", UnmeasuredError, "not to be judged"),
    ):
        found = [each.text for each in verdicts if each.state == state]
        if found:
            count = f"{len(found)} of {len(verdicts)} gates" if len(verdicts) > 1 else "The gate"
            verb = "are" if len(found) > 1 else "is"
            raise kind(f"{count} {verb} {words}: {'; '.join(found)}.")


def _limited(figure: Figure, gate: str, limit: float, document: Document) -> Verdict:
    """Hold a figure against a limit."""
    value = figure.of(document)
    shown = format(limit, figure.format)
    if value is None:
        return _unknown(gate, figure, document)
    least = figure.higher_is_better
    held = value >= limit if least else value <= limit
    text = f"{figure.label} is {format(value, figure.format)}, and --{gate} asks for "
    text += f"{shown} at {'least' if least else 'most'}"
    if not held:
        text += f" ({_off(value, limit, figure)})"
    return Verdict(gate, "held" if held else "failed", text)


def _off(value: float, limit: float, figure: Figure) -> str:
    """Return by how much a value misses a limit."""
    if figure.format.endswith("%"):
        return f"{abs(value - limit) * 100:.2f} points too few"
    share = f", {abs(value / limit - 1):.2%}" if limit else ""
    return f"{format(abs(value - limit), figure.format)}{share} too much"


def _unknown(gate: str, figure: Figure, document: Document) -> Verdict:
    """Return what to say of a figure that is not there; NaN is a failure, and never unknown."""
    bad = document["qualities"][-1].get("not_finite")
    if figure.window and bad:
        where = f"window {bad['window']}, position {bad['position']}"
        return Verdict(
            gate,
            "failed",
            f"{figure.label} is no number, for {bad['rows']} rows of logits hold NaN or inf, the "
            f"first in {where}",
        )
    reason = " without the original" if figure.name in _DIVERGENCES else ""
    return Verdict(
        gate, "unmeasured", f"--{gate} asks for {figure.label}, which was not measured{reason}"
    )


def _regressions(baseline: Document, allowed: float, document: Document) -> list[Verdict]:
    """Hold every figure that the baseline has against it."""
    verdicts = []
    for figure in (_BY_NAME[name] for name in _REGRESSING):
        gate = f"max-regression-{figure.name.replace('_', '-')}"
        before, now = figure.of(baseline), figure.of(document)
        if before is None:
            continue
        if now is None:
            verdicts.append(_unknown(gate, figure, document))
        elif figure.window and not paired(baseline, document):
            verdicts.append(
                Verdict(
                    gate,
                    "unmeasured",
                    f"{figure.label} was measured on another text than the baseline's "
                    f"('{document['text']}' and '{baseline['text']}')",
                )
            )
        else:
            verdicts.append(_regression(figure, gate, before, now, allowed, baseline, document))
    if not verdicts:
        verdicts.append(Verdict("max-regression", "unmeasured", "the baseline has no figures"))
    return verdicts


def _regression(
    figure: Figure,
    gate: str,
    before: float,
    now: float,
    allowed: float,
    baseline: Document,
    document: Document,
) -> Verdict:
    """Hold a figure against the baseline's; worse counts as a share of the baseline's value."""
    worse = (before - now if figure.higher_is_better else now - before) / (abs(before) or 1.0)
    shown = [format(value, figure.format) for value in (now, before)]
    text = f"{figure.label} is {shown[0]}, and the baseline's {shown[1]}"
    if worse <= allowed:
        return Verdict(gate, "held", text)
    found = difference(figure, baseline, document)
    interval = None if found is None else found[1]
    noise = "" if interval is None or not interval[0] <= 0 <= interval[1] else ", within noise"
    text += f": {worse:.2%} worse{noise}, and --max-regression allows {allowed:.2%}"
    return Verdict(gate, "failed", text)
