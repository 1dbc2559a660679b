"""Settings that cannot be together, each pair with the sentence that says why.

    check_together(config, target)

What a setting may be by itself is told with it, see `sections`; what a model and a setting make of
each other, in `job.resolve`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from llm_coreml.config.engine import EngineSettings
from llm_coreml.config.export_config import ExportConfig
from llm_coreml.config.setting import Setting, settings_of
from llm_coreml.config.values import SKIP_HEAD, SKIP_TABLE
from llm_coreml.errors import ConfigError, LlmCoreMLError, UnsupportedError
from llm_coreml.systems import STATE_SYSTEM, older, opset_of
from llm_coreml.targets import Target


@dataclass(frozen=True)
class Contradiction:
    """Settings that cannot be together.

    Attributes:
        holds: Whether settings and target are so.
        told: What is said of them: the reason, and what to do. A field of the config may stand in
            it in braces.
        error: What is raised.
        forced: `--force` passes over it: it works, elsewhere than was asked for.
    """

    holds: Callable[[ExportConfig, Target], bool]
    told: str
    error: type[LlmCoreMLError] = ConfigError
    forced: bool = False


def _too_old(config: ExportConfig) -> bool:
    return older(opset_of(config.minimum_os), STATE_SYSTEM) and config.backend == "coreml"


def _ranged(config: ExportConfig) -> bool:
    return isinstance(config.seq_lengths, str)


def _engine(config: ExportConfig) -> list[Setting]:
    """Return what is asked of a program that only Core ML's own passes do."""
    return [
        each for each in settings_of(EngineSettings) if getattr(config, each.name) != each.default
    ]


def _skips(config: ExportConfig, name: str) -> bool:
    return name in (config.skip_ops or ())


CONTRADICTIONS = (
    Contradiction(
        lambda config, target: config.adapters == "beside" and config.rotate != "none",
        "--adapters beside leaves an adapter's matrices as they are, and --rotate {rotate} turns "
        "what they read and write; drop one of them.",
    ),
    Contradiction(
        lambda config, target: config.adapters == "beside" and config.recover is not None,
        "--recover {recover} trains what --adapters beside takes from the adapter; drop one of "
        "them.",
    ),
    Contradiction(
        lambda config, target: config.adapters == "beside" and config.size is not None,
        "--size {size} is shared out before an adapter is read, and --adapters beside adds its "
        "matrices to that; drop one of them, or give --bits.",
    ),
    Contradiction(
        lambda config, target: (
            (config.adapters == "beside" or config.recover is not None) and config.pt2e != "none"
        ),
        "--pt2e {pt2e} says how a matrix is stored and what it gives as a whole, and --adapters "
        "beside and --recover add a product to it; drop one of them.",
    ),
    Contradiction(
        lambda config, target: config.skip_ops is not None and config.backend == "xnnpack",
        "--skip-ops {skip_ops} leaves operations out of Core ML's programs, and --backend xnnpack "
        "has none; drop one of them.",
    ),
    Contradiction(
        lambda config, target: _skips(config, SKIP_TABLE) and "embedding" in (config.split or ()),
        "--skip-ops {skip_ops} leaves the token table out of Core ML, and --split {split} gives it "
        "a partition of Core ML's; drop one of them.",
    ),
    Contradiction(
        lambda config, target: _skips(config, SKIP_HEAD) and "head" in (config.split or ()),
        "--skip-ops {skip_ops} leaves the head's matrix out of Core ML, and --split {split} gives "
        "it a partition of Core ML's; drop one of them.",
    ),
    Contradiction(
        lambda config, target: _skips(config, SKIP_HEAD) and config.head != "logits",
        "--head {head} has Core ML's program choose tokens by their logits, and --skip-ops "
        "{skip_ops} computes these behind it; drop one of them.",
    ),
    Contradiction(
        lambda config, target: _skips(config, SKIP_HEAD) and config.head_split is not None,
        "--head-split {head_split} cuts the head's matrix in Core ML's program, and --skip-ops "
        "{skip_ops} leaves it out of that; drop one of them.",
    ),
    Contradiction(
        lambda config, target: _skips(config, SKIP_TABLE) and config.gather_split is not None,
        "--gather-split {gather_split} cuts the token table in Core ML's program, and --skip-ops "
        "{skip_ops} leaves it out of that; drop one of them.",
    ),
    Contradiction(
        lambda config, target: config.constants == "inputs" and config.backend == "xnnpack",
        "--constants {constants} is about Core ML's delegates, and --backend xnnpack has none; "
        "drop one of them.",
    ),
    Contradiction(
        lambda config, target: config.constants == "inputs" and config.pt2e != "none",
        "--pt2e {pt2e} makes codes of the weights, and --constants {constants} hands them over as "
        "plain numbers; drop one of them.",
    ),
    Contradiction(
        lambda config, target: config.constants == "inputs" and bool(_engine(config)),
        "--linear-split, --head-split, --gather-split, --layout, --norm, --operations, --pad-heads "
        "and --profile are for weights that are constants of a program, and --constants "
        "{constants} hands them over in each call; drop one of them.",
    ),
    Contradiction(
        lambda config, target: _too_old(config) and config.functions is not None,
        "{minimum_os} is too old: Core ML has models of several functions, which --functions "
        "{functions} makes, from iOS18 and macOS15 on; drop --functions, or use --minimum-os "
        "iOS18.",
        error=UnsupportedError,
    ),
    Contradiction(
        lambda config, target: _too_old(config) and config.kv_cache != "inputs",
        "{minimum_os} is too old: Core ML keeps a KV cache as state from iOS18 and macOS15 on; "
        "give --kv-cache inputs, or use --minimum-os iOS18.",
        error=UnsupportedError,
    ),
    Contradiction(
        lambda config, target: _too_old(config) and bool(_engine(config)),
        "{minimum_os} is too old: --linear-split, --head-split, --gather-split, --layout, "
        "--norm, --operations, --pad-heads and --profile are for weights and states as systems "
        "from iOS18 on have them; drop them, or use --minimum-os iOS18.",
        error=UnsupportedError,
    ),
    Contradiction(
        lambda config, target: config.functions is not None and config.kv_cache == "state",
        "--functions {functions} makes a method of each, and a state is its method's own, so that "
        "no sequence could pass from one to the other beside --kv-cache state; give --kv-cache "
        "inputs, or leave it out.",
    ),
    Contradiction(
        lambda config, target: config.functions is not None and config.seq_lengths is not None,
        "--functions {functions} gives each method its length, and --seq-lengths {seq_lengths} "
        "tells what a single method takes; drop one of them.",
    ),
    Contradiction(
        lambda config, target: config.functions is not None and config.backend == "xnnpack",
        "--functions {functions} is a form of Core ML programs, and --backend xnnpack reads every "
        "length in one method; drop one of them.",
    ),
    Contradiction(
        lambda config, target: config.profile != "none" and not target.neural_engine,
        "--profile {profile} is for the Neural Engine, which --target {target} does not use; give "
        "--target ane, or drop it.",
    ),
    Contradiction(
        lambda config, target: (
            config.profile == "ane-ios18" and not older(opset_of(config.minimum_os), "iOS26")
        ),
        "--profile ane-ios18 has fused attention, which has been reported to give inf on the "
        "Neural Engine of iOS 26 (executorch issue 15833), and --minimum-os {minimum_os} is no "
        "older; give --profile ane-ios26.",
    ),
    Contradiction(
        lambda config, target: config.backend == "xnnpack" and bool(_engine(config)),
        "--linear-split, --head-split, --gather-split, --layout, --norm, --operations, --pad-heads "
        "and --profile are about Core ML, and --backend xnnpack makes no Core ML model; drop one "
        "of them.",
    ),
    Contradiction(
        lambda config, target: config.head != "logits" and config.backend == "xnnpack",
        "--head {head} is a form of Core ML programs, and --backend xnnpack makes a program for "
        "ExecuTorch's stock runner, which takes logits; drop one of them.",
    ),
    Contradiction(
        lambda config, target: config.partition_size is not None and config.backend == "xnnpack",
        "--partition-size {partition_size} is about Core ML's delegates, and --backend xnnpack has "
        "none; drop one of them.",
    ),
    Contradiction(
        lambda config, target: config.split is not None and config.backend == "xnnpack",
        "--split {split} is about Core ML's delegates, and --backend xnnpack has none; drop one "
        "of them.",
    ),
    Contradiction(
        lambda config, target: (
            _ranged(config) and config.backend == "coreml" and target.compute_unit == "CPU_AND_NE"
        ),
        "--seq-lengths {seq_lengths} is a range, and Core ML never gives a program with ranges of "
        "shapes to the Neural Engine of --target ane (coremltools, guide on flexible shapes); list "
        "the lengths, such as 1,64,512, or give --force to have it run on the CPU.",
        error=UnsupportedError,
        forced=True,
    ),
    Contradiction(
        lambda config, target: config.codes_of is not None and config.adapters == "beside",
        "--adapters beside has the base's codes already, and --codes-of {codes_of} fits them to "
        "the tuned weights; drop one of them.",
    ),
    Contradiction(
        lambda config, target: config.codes_of is not None and config.pt2e != "none",
        "--pt2e {pt2e} chooses codes by itself, and --codes-of {codes_of} keeps those of another "
        "export; drop one of them.",
    ),
)


def check_together(config: ExportConfig, target: Target) -> None:
    """Refuse settings that cannot be together.

    Raises:
        ConfigError: two settings contradict each other.
        UnsupportedError: a system or a target does not take what is asked for.
    """
    for each in CONTRADICTIONS:
        if each.holds(config, target) and not (each.forced and config.force):
            raise each.error(each.told.format_map(_as_given(config)))


def _as_given(config: ExportConfig) -> dict[str, object]:
    """Return the settings, lists as flags have them."""
    return {
        name: ",".join(map(str, value)) if isinstance(value, tuple) else value
        for name, value in vars(config).items()
    }
