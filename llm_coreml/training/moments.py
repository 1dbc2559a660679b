"""Which moments of a training are exported.

moments = moments_of(50)                 # every 50 steps; or "best", "save", (10, 200), ...
moments.due_at_step(100)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llm_coreml.config.values import checked_count
from llm_coreml.errors import ConfigError, nearest

EVENTS = ("evaluate", "save", "best", "end")


@dataclass(frozen=True)
class Moments:
    """When to export.

    Attributes:
        event: One of `EVENTS`; empty where steps are given.
        every: Each so many steps, 0 for none.
        steps: These steps.
    """

    event: str = ""
    every: int = 0
    steps: frozenset[int] = frozenset()

    def due_at_step(self, step: int) -> bool:
        """Say whether the weights after `step` are to be exported, whatever else happens then."""
        return step in self.steps or (self.every > 0 and step % self.every == 0)

    def never(self, args: Any) -> str | None:
        """Return why a training of these `TrainingArguments` has no such moment, None if it has."""
        evaluates = args.eval_strategy != "no"
        if self.event == "evaluate" and not evaluates:
            return "the trainer evaluates nothing: give it an eval_strategy"
        if self.event == "save" and args.save_strategy == "no":
            return "the trainer saves nothing: give it a save_strategy"
        chooses = evaluates and args.save_strategy != "no"
        if self.event == "best" and not (chooses and args.metric_for_best_model):
            return (
                "the trainer knows no best: give it an eval_strategy, a save_strategy and a "
                "metric_for_best_model"
            )
        return None


def moments_of(when: str | int | Sequence[int]) -> Moments:
    """Return the moments that `when` names.

    Args:
        when: One of `EVENTS`, a number of steps between two exports, or the steps themselves.

    Raises:
        ConfigError: it names none.
    """
    if isinstance(when, str):
        if when not in EVENTS:
            known = ", ".join(EVENTS)
            raise ConfigError(
                f"when is '{when}'; give {known}, a number of steps, or steps."
                f"{nearest(when, EVENTS)}"
            )
        return Moments(event=when)
    if isinstance(when, Sequence):
        if not when:
            raise ConfigError("when names no step; give some, or a number of steps between two.")
        return Moments(steps=frozenset(checked_count("when", each) for each in when))
    return Moments(every=checked_count("when", when))
