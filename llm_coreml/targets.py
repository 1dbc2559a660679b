"""Where an artifact is meant to run, and what follows for formats and graph.

What a target is known not to take is said by `rules`.

    target = get_target("ane")
    target.default_scheme       # 'codebook'
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from llm_coreml.errors import ConfigError, UnsupportedError, nearest


@dataclass(frozen=True)
class Target:
    """One compute unit.

    Attributes:
        name: The value of `--target`.
        compute_unit: Core ML's name of it.
        default_scheme: What `--bits 4` means here.
        attention: `fused` or `decomposed`, see `decoder.self_attention`.
        summary: One line for `llm-coreml ls`.
    """

    name: str
    compute_unit: Literal["CPU_AND_GPU", "CPU_AND_NE", "CPU_ONLY", "ALL"]
    default_scheme: str
    attention: Literal["fused", "decomposed"]
    summary: str

    @property
    def neural_engine(self) -> bool:
        """Whether the Neural Engine may be given the program."""
        return self.compute_unit in ("CPU_AND_NE", "ALL")


@dataclass(frozen=True)
class Precision:
    """What the numbers of a program are stored as.

    Attributes:
        name: The value of `--compute-precision`.
        bits: Of one number.
        dtype: NumPy's and torch's name of it.
    """

    name: Literal["fp16", "fp32"]
    bits: Literal[16, 32]
    dtype: Literal["float16", "float32"]


@dataclass(frozen=True)
class Backend:
    """What a program is lowered for, and what follows.

    Attributes:
        name: The value of `--backend`.
        runtime: What runs its programs on any machine: `reference`, for Core ML models, or
            `executorch`.
        stores_dense: Weights are stored as fp32 numbers, whatever they were quantized to.
        fused_attention: Attention may be one operation, if the target takes it so.
        has_targets: A target and a system are chosen; else a program runs on any processor.
    """

    name: str
    runtime: Literal["reference", "executorch"]
    stores_dense: bool
    fused_attention: bool
    has_targets: bool


# By the names that settings and manifests hold.
BACKENDS: Mapping[str, Backend] = MappingProxyType(
    {
        each.name: each
        for each in (
            Backend(
                "coreml",
                runtime="reference",
                stores_dense=False,
                fused_attention=True,
                has_targets=True,
            ),
            Backend(
                "xnnpack",
                runtime="executorch",
                stores_dense=True,
                fused_attention=False,
                has_targets=False,
            ),
        )
    }
)

PRECISIONS: Mapping[str, Precision] = MappingProxyType(
    {
        "fp16": Precision("fp16", 16, "float16"),
        "fp32": Precision("fp32", 32, "float32"),
    }
)

TARGETS: Mapping[str, Target] = MappingProxyType(
    {
        target.name: target
        for target in (
            Target("gpu", "CPU_AND_GPU", "int4-group", "fused", "Mac and iPhone GPU (default)"),
            Target(
                "ane",
                "CPU_AND_NE",
                "codebook",
                "decomposed",
                "Neural Engine: codebook weights, attention without the fused op",
            ),
            Target("cpu", "CPU_ONLY", "int4-group", "fused", "CPU, for reference and tests"),
            Target(
                "all",
                "ALL",
                "codebook",
                "decomposed",
                "wherever Core ML puts it: built as for ane",
            ),
        )
    }
)

# MLState and sub-byte weights both begin with iOS 18; older systems cannot hold the cache.
MINIMUM_OS: Mapping[str, str] = MappingProxyType(
    {
        "iOS18": "iOS18",
        "macOS15": "iOS18",
        "watchOS11": "iOS18",
        "tvOS18": "iOS18",
        "visionOS2": "iOS18",
        "iOS26": "iOS26",
        "macOS26": "iOS26",
        "watchOS26": "iOS26",
        "tvOS26": "iOS26",
        "visionOS26": "iOS26",
    }
)
_TOO_OLD = tuple(f"iOS{n}" for n in range(13, 18)) + tuple(f"macOS{n}" for n in range(10, 15))


def get_target(name: str) -> Target:
    """Return the target called `name`.

    Raises:
        ConfigError: no such target.
    """
    if name not in TARGETS:
        raise ConfigError(
            f"There is no target '{name}'; the targets are {', '.join(TARGETS)}."
            + nearest(name, TARGETS)
        )
    return TARGETS[name]


def opset_of(minimum_os: str) -> str:
    """Return coremltools' name of the opset that `minimum_os` brings, `iOS18` or `iOS26`.

    Raises:
        UnsupportedError: an OS that cannot hold the KV cache or 4-bit weights.
        ConfigError: no such OS.
    """
    if minimum_os in MINIMUM_OS:
        return MINIMUM_OS[minimum_os]
    if minimum_os in _TOO_OLD:
        raise UnsupportedError(
            f"{minimum_os} is too old: Core ML keeps a KV cache as state, and holds int4, grouped "
            "and codebook weights, from iOS18 and macOS15 on; use --minimum-os iOS18."
        )
    raise ConfigError(
        f"There is no OS '{minimum_os}'; known are {', '.join(MINIMUM_OS)}."
        + nearest(minimum_os, MINIMUM_OS)
    )
