"""Settings that cannot be together, each pair with the sentence that says why.

    check_together(config, target)

What a setting may be by itself is told with it, see `sections`; what a model and a setting make of
each other, in `job.resolve`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from llm_coreml.config.export_config import ExportConfig
from llm_coreml.errors import ConfigError, UnsupportedError
from llm_coreml.targets import Target


@dataclass(frozen=True)
class Contradiction:
    """Settings that cannot be together.

    Attributes:
        holds: Whether settings and target are so.
        told: What is said of them: the reason, and what to do. A field of the config may stand in
            it in braces.
        forced: `--force` passes over it: what is known against it is a report on a device.
    """

    holds: Callable[[ExportConfig, Target], bool]
    told: str
    forced: bool = False


def _ranged(config: ExportConfig) -> bool:
    return isinstance(config.seq_lengths, str)


CONTRADICTIONS = (
    Contradiction(
        lambda config, target: config.functions is not None and config.cache == "state",
        "--functions {functions} makes a method of each, and a state is its method's own, so that "
        "no sequence could pass from one to the other beside --cache state; give --cache inputs, "
        "or leave it out.",
    ),
    Contradiction(
        lambda config, target: config.functions is not None and config.seq_lengths is not None,
        "--functions {functions} gives each method its length, and --seq-lengths {seq_lengths} "
        "gives one method several; drop one of them.",
    ),
    Contradiction(
        lambda config, target: config.functions is not None and config.backend == "xnnpack",
        "--functions {functions} is a form of Core ML programs, and --backend xnnpack reads every "
        "length in one method; drop one of them.",
    ),
    Contradiction(
        lambda config, target: (
            _ranged(config) and config.backend == "coreml" and target.compute_unit == "CPU_AND_NE"
        ),
        "--seq-lengths {seq_lengths} is a range, and Core ML never gives a program with ranges of "
        "shapes to the Neural Engine of --target ane (coremltools, guide on flexible shapes); list "
        "the lengths, such as 1,64,512, or give --force to have it run on the CPU.",
        forced=True,
    ),
)


def check_together(config: ExportConfig, target: Target) -> None:
    """Refuse settings that cannot be together.

    Raises:
        ConfigError: two settings contradict each other.
        UnsupportedError: a target is known not to take what is asked for, and nobody forces it.
    """
    for each in CONTRADICTIONS:
        if each.holds(config, target) and not (each.forced and config.force):
            told = each.told.format_map({name: value for name, value in vars(config).items()})
            raise (UnsupportedError if each.forced else ConfigError)(told)
