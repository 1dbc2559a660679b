"""Matrices that a checkpoint holds quantized already: taken as they are, never rounded again.

report = import_report(checkpoint)              # None where nothing is quantized
plan = with_imports(make_plan(...), ...)        # their schemes come from the checkpoint
weight = imported_weight(checkpoint.packed(name))
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal, final

import torch

from llm_coreml.checkpoint import Checkpoint
from llm_coreml.checkpoint.matrix import Packed, PackedForm
from llm_coreml.config import ExportConfig
from llm_coreml.decoder import Decoder, DecoderSpec
from llm_coreml.decoder.linear import Linear
from llm_coreml.errors import ConfigError, UnsupportedError
from llm_coreml.quantize.formats.schemes import IntChannel, IntGroup, Scheme, TableGroup
from llm_coreml.quantize.formats.tensors import integer_tensor, lookup_tensor
from llm_coreml.quantize.plan.plan import QuantizationPlan, matrices
from llm_coreml.targets import get_target, opset_of

_ORDER_ADVICE = (
    "which cannot be imported. Quantize with desc_act=False, or give the unquantized checkpoint "
    "and --calibrate."
)
# What chooses codes, and so cannot be asked for where they are chosen already.
_CHOICES = ("bits", "size", "plan", "scheme", "calibrate")


@final
@dataclass(frozen=True)
class ImportReport:
    """How true an import is to the checkpoint.

    Attributes:
        format: The formats of its matrices.
        matrices: How many there are.
        exactness: `exact` if each weight is the very number that the format defines.
        largest_error: Largest difference, as a share of the distance between two codes.
        tensor: The matrix that has it; None if there is none.
    """

    format: str
    matrices: int
    exactness: Literal["exact", "inexact"]
    largest_error: float
    tensor: str | None

    @property
    def sentence(self) -> str:
        """Return the exactness in words."""
        if self.tensor is None:
            return "exact, each weight is the number that the format defines"
        return (
            f"inexact, '{self.tensor}' is off by up to {self.largest_error:.2%} of the distance "
            "between two codes"
        )


def refuse_choices(config: ExportConfig) -> ExportConfig:
    """Return `config` for a quantized checkpoint, which leaves no codes to choose.

    Linear layers that it holds unquantized stay so.

    Raises:
        ConfigError: codes are to be chosen.
    """
    for name in _CHOICES:
        value = getattr(config, name)
        if value is not None:
            raise ConfigError(
                f"--{name} {value} chooses codes, but the checkpoint's linear layers are quantized "
                f"already and are taken as they are; drop --{name}, or give the unquantized "
                "checkpoint that it was made from."
            )
    if config.rotate != "none":
        raise ConfigError(
            f"--rotate {config.rotate} changes weights, but the checkpoint's are quantized already "
            "and are taken as they are; drop --rotate, or give the unquantized checkpoint that it "
            "was made from."
        )
    return replace(config, scheme="none")


def import_report(checkpoint: Checkpoint) -> ImportReport | None:
    """Return what becomes of quantized matrices, None where there are none.

    Raises:
        CheckpointError: scales or zero points are damaged.
    """
    forms = checkpoint.forms()
    if not forms:
        return None
    worst = max(sorted(forms), key=lambda name: forms[name].error)
    error = forms[worst].error
    return ImportReport(
        format=", ".join(sorted({form.label for form in forms.values()})),
        matrices=len(forms),
        exactness="inexact" if error else "exact",
        largest_error=error,
        tensor=worst if error else None,
    )


def with_imports(
    plan: QuantizationPlan,
    config: ExportConfig,
    spec: DecoderSpec,
    held: Mapping[str, PackedForm],
) -> QuantizationPlan:
    """Give each matrix that is quantized already the scheme that it has.

    Args:
        plan: For all others.
        config: As the user gave it.
        spec: Sizes of the decoder.
        held: How the checkpoint stores matrices, by their modules' names in the decoder.

    Raises:
        ConfigError: another format is asked for the token table or the head.
        UnsupportedError: the target refuses a scheme.
    """
    schemes = {name: _scheme(form, config) for name, form in held.items()}
    _refuse_misfits(config, schemes)
    linears = {name: schemes.get(name, plan.linear) for name, _ in matrices(spec)}
    linear = Counter(linears.values()).most_common(1)[0][0]
    embedding = schemes.get("embed_tokens", plan.embedding)
    lm_head = schemes.get("lm_head", plan.lm_head)
    if spec.tie_word_embeddings and "embed_tokens" in schemes:
        lm_head = embedding
    for name, flag in (("embed_tokens", "embedding"), ("lm_head", "lm_head")):
        shared = "embed_tokens" if spec.tie_word_embeddings else name
        _refuse_table(config, flag, held.get(name, held.get(shared)))
    tied = spec.tie_word_embeddings and embedding == lm_head
    return QuantizationPlan(
        linear,
        embedding,
        lm_head,
        tied,
        0 if tied else plan.untied_bytes,
        MappingProxyType({name: found for name, found in linears.items() if found != linear}),
    )


def imported_weight(packed: Packed, bits: int) -> torch.Tensor:
    """Return a quantized matrix as the lowering takes it, its codes held in `bits`."""
    levels = packed.levels
    if levels.entries is not None:
        table = levels.entries.view(1, 1, -1)
        return lookup_tensor(packed.codes.view(torch.uint8), table, bits, levels.scale, None)
    return integer_tensor(packed.codes, levels.scale, levels.zero_point, bits)


def set_input_order(decoder: Decoder, name: str, order: torch.Tensor | None) -> None:
    """Have the inputs of a matrix put in the order of its weight's columns.

    Args:
        decoder: Whose matrix it is.
        name: Of its module. Those with the same inputs are set after the first of them.
        order: int64 `[in_features]`; None is their own.

    Raises:
        UnsupportedError: matrices with the same inputs want them in different orders.
    """
    wanted = None if order is None else order.to(torch.int32)
    shared = decoder.wiring.first_of(name)
    first = decoder.get_submodule(shared)
    found = first.input_order if isinstance(first, Linear) else None
    if name != shared:
        same = found is wanted or not (found is None or wanted is None or (found != wanted).any())
        if not same:
            raise UnsupportedError(
                f"{name} has its inputs in another order than {shared.rpartition('.')[2]}, which "
                f"reads the same, {_ORDER_ADVICE}"
            )
    elif wanted is not None:
        if first is decoder.lm_head or not isinstance(first, Linear):
            raise UnsupportedError(f"{name} was quantized in activation order, {_ORDER_ADVICE}")
        first.input_order = wanted


def refuse_inexact(report: ImportReport, config: ExportConfig) -> None:
    """Raise UnsupportedError for an import that is not exact, unless `config` allows it."""
    if report.exactness == "inexact" and not config.allow_inexact:
        raise UnsupportedError(
            f"These {report.format} weights cannot be stored for Core ML as they are: "
            f"{report.sentence}. Give --allow-inexact to take that, or the unquantized checkpoint."
        )


def _scheme(form: PackedForm, config: ExportConfig) -> Scheme:
    """Return what a matrix is held in: its own bits, or the next integers where those fail."""
    scale_bits = 32 if config.compute_precision == "fp32" else 16
    wide = 4 if form.bits <= 4 else 8
    if form.group_size is None:
        return IntChannel(wide, scale_bits, form.zero_point)
    if form.table:
        return TableGroup(form.bits, form.group_size, scale_bits)
    own = IntGroup(form.bits, form.group_size, scale_bits, form.zero_point)
    misfits = get_target(config.target).misfits
    fails = opset_of(config.minimum_os) < own.minimum_os or any(t in misfits for t in own.traits)
    return replace(own, bits=wide) if fails else own


def _refuse_misfits(config: ExportConfig, schemes: Mapping[str, Scheme]) -> None:
    target = get_target(config.target)
    for name, scheme in schemes.items():
        for trait in scheme.traits:
            if trait in target.misfits and not config.force:
                raise UnsupportedError(
                    f"The checkpoint holds {name} as {scheme.label}, and --target {target.name} "
                    f"does not take {scheme.name}: {target.misfits[trait]}. Use --target gpu, give "
                    "the unquantized checkpoint, or --force to export it all the same."
                )


def _refuse_table(config: ExportConfig, field: str, form: PackedForm | None) -> None:
    """Refuse a format for a table that has one; the default is what nobody asked for."""
    value = getattr(config, field)
    if form is not None and value != getattr(ExportConfig(), field):
        flag = field.replace("_", "-")
        raise ConfigError(
            f"--{flag} {value} chooses a format, but the checkpoint's is quantized already "
            f"({form.label}, {form.bits} bit) and is taken as it is; drop --{flag}."
        )
