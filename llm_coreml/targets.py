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

from llm_coreml.errors import ConfigError, nearest

# What linear layers are in a program: `linear` of [1, S, C], or convolutions of [1, C, 1, S].
Layout = Literal["linear", "conv"]
# How a norm is computed, see `decoder.norm`.
NormForm = Literal["scaled", "l2", "layer"]
# Whether a program does the same in as few operations as are known.
Operations = Literal["usual", "fewest"]


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
