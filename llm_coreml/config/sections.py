"""Every setting of an export, in sections: source, weights, calibration, program, target, engine.

A field's text is its documentation: the help page, the recipes' schema and the documents show it.
Rules between a setting and a model are held where both are known, see `job.resolve`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from llm_coreml.config.calibration_settings import CalibrationSettings
from llm_coreml.config.engine import EngineSettings
from llm_coreml.config.scheme_text import (
    checked_scheme,
    patterns_alone,
    plain_name,
    read_scheme,
    spelled_format,
    spelled_scheme,
)
from llm_coreml.config.setting import Section, setting, settings_of
from llm_coreml.config.values import (
    DEFAULT_CODEBOOK_ROWS,
    DEFAULT_CONTEXT,
    DEFAULT_SEQ_LENGTHS,
    DEFAULT_TABLE,
    MOST_BYTES,
    MOST_POSITIONS,
    SKIPPED,
    checked_bits,
    checked_context,
    checked_functions,
    checked_lengths,
    checked_passes,
    checked_skips,
    checked_specs,
    checked_split,
    checked_system,
    checked_target,
    read_bytes,
    read_lengths,
    read_names,
)
from llm_coreml.errors import ConfigError
from llm_coreml.heads import checked_head
from llm_coreml.targets import TARGETS

# "gpu, ane, cpu or all"
_UNITS = " or ".join(", ".join(TARGETS).rsplit(", ", 1))
Rotate = Literal["none", "residual", "heads", "both"]
PT2E = Literal["none", "weights", "static"]
# What has no meaning for other backends.
_CORE_ML = frozenset({"model_type", "passes", "compile_specs"})
# What each of these decides of others, which cannot be given beside it.
_DECIDED: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "plan": (
            *("scheme", "bits", "size", "lm_head", "group_size", "zero_point", "codebook_rows"),
            *("codebook_columns", "codebook_vector", "codebook_scale", "embedding"),
        ),
        "size": ("scheme", "bits"),
        "pt2e": ("scheme", "bits", "size", "plan"),
    }
)


def decided_by(name: str, value: object) -> tuple[str, ...]:
    """Return the settings that another one decides, if it has this value."""
    if name == "bits":
        mixed = isinstance(value, float) and not value.is_integer()
        return ("scheme",) if mixed else ()
    if name == "scheme" and isinstance(value, str):
        text = read_scheme(value)
        tables = (("embedding", "embed_tokens"), ("lm_head", "lm_head"))
        named = [flag for flag, matrix in tables if text.pattern_of(matrix)]
        return (*named, *(("bits", "size") if "*" in text.patterns else ()))
    return () if value in (None, "none") else _DECIDED.get(name, ())


def undecided(name: str, other: str, value: Any) -> Any:
    """Return what is left of a setting's value beside `name`, which decides it.

    Bits and sizes leave the patterns of a scheme as they are.
    """
    return patterns_alone(value) if other == "scheme" and name in ("bits", "size") else None


def _checked_family(value: str) -> str:
    """Return the name of a family. Raises ConfigError if there is none; loads them only then."""
    from llm_coreml.families import checked_family

    return checked_family(value)


@dataclass(frozen=True)
class SourceSettings(Section):
    """How the model is read.

    Raises:
        ConfigError: there is no such family.
    """

    family: str | None = setting(
        None,
        "Read a model whose model_type has no family as one of this family.",
        metavar="MODEL_TYPE",
        shown="that of config.json",
        check=_checked_family,
    )


@dataclass(frozen=True)
class WeightSettings(Section):
    """What the weights are stored as.

    Raises:
        ConfigError: a value breaks a rule of its own, or two of them decide the same.
    """

    bits: float | None = setting(
        None,
        "Bits per weight: 1, 2, 3, 4, 6, 8 or 16, or a mean such as 3.5.",
        shown="4",
        check=checked_bits,
    )
    size: int | None = setting(
        None,
        "Mix formats to fit: 600MB, 1.2GB.",
        metavar="BYTES",
        read=read_bytes,
        most=MOST_BYTES,
    )
    plan: str | None = setting(
        None, "Formats of an earlier export: its manifest.json.", metavar="FILE"
    )
    scheme: str | None = setting(
        None,
        "Weight format, see `llm-coreml ls`, or patterns: lm_head=codebook:6,layers.0.*=FORMAT.",
        shown="the target's",
        check=checked_scheme,
        spelled=spelled_scheme,
        mapping=True,
    )
    group_size: int = setting(
        32, "int4-group and such: inputs per scale.", least=1, most=MOST_POSITIONS
    )
    zero_point: Literal["none", "int", "float"] = setting(
        "none", "Integer formats: what is subtracted from codes, one for every scale."
    )
    codebook_rows: int | None = setting(
        None,
        "codebook: rows per table.",
        shown=str(DEFAULT_CODEBOOK_ROWS),
        least=1,
        most=MOST_POSITIONS,
    )
    codebook_columns: int | None = setting(
        None, "codebook: inputs per table.", shown="all", least=1, most=MOST_POSITIONS
    )
    codebook_vector: int = setting(1, "codebook: rows per entry.", least=1, most=MOST_POSITIONS)
    codebook_scale: bool = setting(False, "codebook: a factor for each row.")
    embedding: str | None = setting(
        None,
        "Scheme of the token table.",
        shown=f"{DEFAULT_TABLE}; none beside --scheme none or --bits 16",
        spelled=spelled_format,
    )
    lm_head: str | None = setting(
        None,
        "Scheme of the output head; the token table's by default.",
        spelled=spelled_format,
    )
    pt2e: PT2E = setting(
        "none",
        "int8 linear layers by ExecuTorch's CoreMLQuantizer; static: what they read and give, too.",
    )
    rotate: Rotate = setting(
        "none",
        "Spread outlying weights first, by rotations that leave the model's function as it is.",
    )
    residual_shift: int | None = setting(
        None,
        "Halve the residual stream so often, in the weights alone, for fp16 to hold it.",
        shown="as a text needs it",
        least=0,
        most=8,
    )
    adapters: Literal["merged", "beside"] = setting(
        "merged",
        "beside keeps a LoRA adapter's matrices apart, as fp16, and the base's codes as they are.",
    )
    codes_of: str | None = setting(
        None,
        "Keep the codes of another export, such as a fine-tune's base; fit scales and tables.",
        metavar="FOLDER",
        shown="chosen",
    )
    allow_inexact: bool = setting(
        False, "Take a quantized checkpoint that Core ML cannot hold exactly."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size is not None and self.size < 1:
            raise ConfigError(f"--size is {self.size}; give bytes, such as 600MB.")
        settings = {each.name: each for each in settings_of(WeightSettings)}
        for name in ("plan", "size", "bits", "scheme", "pt2e"):
            own = getattr(self, name)
            for other in decided_by(name, own):
                value, flag = getattr(self, other), settings[other].flag
                if undecided(name, other, value) == value:
                    continue
                # Earlier releases recorded the usual table beside a plan, too.
                usual = self._usual_table if other == "embedding" else None
                if value not in (settings[other].default, usual):
                    decider = f"--{name}" if name in ("plan", "size") else f"--{name} {own}"
                    raise ConfigError(
                        f"{decider} decides what {flag} {value} would; drop one of them."
                    )

    @property
    def table(self) -> str:
        """The scheme of the token table: nothing is quantized if the linear layers are not."""
        return self.embedding or self._usual_table

    @property
    def _usual_table(self) -> str:
        unquantized = plain_name(self.scheme) == "none" or self.bits == 16
        return "none" if unquantized else DEFAULT_TABLE

    @property
    def mixed(self) -> bool:
        """Whether formats are to be chosen by what they cost the model."""
        return self.size is not None or isinstance(self.bits, float)


@dataclass(frozen=True)
class ProgramSettings(Section):
    """What the program takes and returns.

    Raises:
        ConfigError: a value breaks a rule of its own.
    """

    logits: Literal["last", "all"] = setting("last", "Rows of logits that a call returns.")
    head: str = setting(
        "logits",
        "What a row gives: every logit, the K likeliest tokens with theirs, or the likeliest.",
        metavar="logits|topk:K|argmax",
        check=checked_head,
    )
    kv_cache: Literal["state", "inputs"] | None = setting(
        None,
        "Hold the KV cache as a state, or have it as inputs and outputs of each call.",
        shown="state; inputs beside --functions",
    )
    context: int | None = setting(
        None,
        "Positions of the KV cache.",
        shown=f"up to {DEFAULT_CONTEXT}",
        check=checked_context,
        most=MOST_POSITIONS,
    )
    seq_lengths: tuple[int, ...] | str | None = setting(
        None,
        "Chunk lengths to accept: some, one, or a range.",
        metavar="N,N,...|1..N",
        shown=",".join(map(str, DEFAULT_SEQ_LENGTHS)),
        check=checked_lengths,
        read=read_lengths,
        most=MOST_POSITIONS,
    )
    functions: str | None = setting(
        None,
        "Methods that share the weights, of one length each: prefill:512,decode:1.",
        metavar="NAME:N,NAME:N",
        check=checked_functions,
    )
    partition_size: int | None = setting(
        None,
        "Cut the program into partitions with so many bytes of weights at most: 950MB.",
        metavar="BYTES",
        shown="one partition; 2GB for models with more",
        read=read_bytes,
        least=1,
        most=MOST_BYTES,
    )
    split: tuple[str, ...] | None = setting(
        None,
        "Give the token table, the head or both a partition of its own.",
        metavar="embedding,head",
        check=checked_split,
        read=read_names,
    )
    skip_ops: tuple[str, ...] | None = setting(
        None,
        "Have ExecuTorch's kernels run the token table or the head's matrix, and not Core ML.",
        metavar=",".join(SKIPPED),
        check=checked_skips,
        read=read_names,
    )
    constants: Literal["delegate", "inputs"] = setting(
        "delegate", "Where the weights lie: in Core ML's programs, or beside them as their inputs."
    )


@dataclass(frozen=True)
class TargetSettings(Section):
    """What the program is to run on.

    Raises:
        ConfigError: there is no such target or system, or settings contradict each other.
        UnsupportedError: the system is too old.
    """

    target: str = setting("gpu", f"Compute unit: {_UNITS}.", check=checked_target)
    minimum_os: str = setting("iOS18", "Oldest system to run on.", check=checked_system)
    compute_precision: Literal["fp16", "fp32"] = setting("fp16", "Precision of activations.")
    backend: Literal["coreml", "xnnpack"] = setting(
        "coreml", "xnnpack makes a twin that ExecuTorch's stock runner runs on Linux."
    )
    model_type: Literal["model", "compiled_model"] = setting(
        "model", "compiled_model is compiled for devices here, which needs macOS."
    )
    passes: tuple[str, ...] | None = setting(
        None,
        "coremltools' passes to run instead of the usual; -NAME leaves one of these out.",
        metavar="NAME,NAME,...",
        shown="its own pipeline, with ours",
        check=checked_passes,
        read=read_names,
    )
    compile_specs: tuple[str, ...] | None = setting(
        None,
        "Further compile specs for ExecuTorch's Core ML backend, as they are.",
        metavar="KEY=VALUE,...",
        shown="those of the other settings",
        check=checked_specs,
        read=read_names,
    )
    force: bool = setting(False, "Export what the target is known to refuse.")

    def __post_init__(self) -> None:
        super().__post_init__()
        for each in settings_of(TargetSettings):
            value = getattr(self, each.name)
            if each.name in _CORE_ML and value != each.default and self.backend != "coreml":
                raise ConfigError(
                    f"{each.flag} is about Core ML, and --backend {self.backend} makes no Core ML "
                    "model; drop one of them."
                )


SECTIONS: Mapping[str, type[Section]] = MappingProxyType(
    {
        "source": SourceSettings,
        "weights": WeightSettings,
        "calibration": CalibrationSettings,
        "program": ProgramSettings,
        "target": TargetSettings,
        "engine": EngineSettings,
    }
)
