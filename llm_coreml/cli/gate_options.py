"""The gates of `llm-coreml eval`: their options, and what they ask for once these are read."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llm_coreml.cli.options import PATH, memory
from llm_coreml.output import check_writable

if TYPE_CHECKING:  # numpy, which --help does without
    from llm_coreml.eval.gates import Gates


@dataclass(frozen=True)
class GateOptions:
    """What was given.

    Attributes:
        max_perplexity: Largest perplexity.
        max_kl: Largest mean KL.
        min_top1: Least agreement.
        max_bytes: Most bytes.
        against: Where a baseline is.
        max_regression: By which share it may be worse.
        junit: Where to write a report for CI.
    """

    max_perplexity: float | None
    max_kl: float | None
    min_top1: float | None
    max_bytes: int | None
    against: Path | None
    max_regression: float | None
    junit: Path | None

    def __post_init__(self) -> None:
        """Refuse options that mean nothing without another."""
        if self.max_regression is not None and self.against is None:
            raise click.UsageError("--max-regression needs a baseline; give one with --against.")
        asked = (self.max_perplexity, self.max_kl, self.min_top1, self.max_bytes, self.against)
        if self.junit is not None and all(each is None for each in asked):
            raise click.UsageError("--junit tells of gates; give one, such as --max-perplexity.")

    def gates(self, artifact_only: bool) -> Gates:
        """Return the gates, all that can be checked before an evaluation being checked.

        Raises:
            ConfigError: a value out of range, or a baseline that cannot be read.
            OutputError: the report cannot be written.
            UnmeasuredError: a gate compares with an original that is to be left out.
        """
        from llm_coreml.eval.gates import Gates
        from llm_coreml.eval.results_file import latest_result

        if self.junit is not None:
            check_writable(self.junit.parent, self.junit.name)
        regression = {} if self.max_regression is None else {"max_regression": self.max_regression}
        gates = Gates(
            max_perplexity=self.max_perplexity,
            max_kl=self.max_kl,
            min_top1=self.min_top1,
            max_bytes=self.max_bytes,
            baseline=None if self.against is None else latest_result(self.against),
            **regression,
        )
        gates.check_measured(artifact_only)
        return gates

    def judge(self, gates: Gates, name: str, document: dict[str, Any]) -> None:
        """Hold an evaluation against the gates, and write the report.

        Raises:
            GateError: one does not hold.
            OutputError: the report cannot be written.
            UnmeasuredError: one asks for what was not measured.
        """
        from llm_coreml.eval.gates import judge, raise_failures
        from llm_coreml.eval.junit import write_junit

        verdicts = judge(gates, document)
        if self.junit is not None:
            write_junit(self.junit, name, verdicts)
        raise_failures(verdicts)


def _share(_: click.Context, __: click.Parameter, value: str | None) -> float | None:
    """Return the share that `1%` or `0.01` means."""
    if value is None:
        return None
    try:
        share = float(value[:-1]) / 100 if value.endswith("%") else float(value)
    except ValueError:
        share = math.nan
    if not (math.isfinite(share) and share >= 0):
        raise click.BadParameter("it is a share such as 1% or 0.01, not below 0.")
    return share


_OPTIONS = (
    click.option("--max-perplexity", type=float, help="Gate: largest perplexity per token."),
    click.option("--max-kl", type=float, help="Gate: largest mean KL from the original, in nats."),
    click.option("--min-top1", type=float, help="Gate: least top-1 agreement, 0 to 1."),
    click.option("--max-bytes", callback=memory, help="Gate: largest program, such as 600MB."),
    click.option("--against", type=PATH, help="Gate: results that must not be worse by far."),
    click.option("--max-regression", callback=_share, help="How far, such as 1%.  [default: 1%]"),
    click.option("--junit", type=PATH, help="Write what became of the gates as JUnit XML."),
)


def gated(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of gates to a command, which is given them as `gate_options`."""

    @functools.wraps(command)
    def call(**given: Any) -> Any:
        names = GateOptions.__dataclass_fields__
        options = GateOptions(**{name: given.pop(name) for name in names})
        return command(gate_options=options, **given)

    for option in reversed(_OPTIONS):
        call = option(call)
    return call
