"""Matrices that a checkpoint holds quantized already: taken as they are, never rounded again.

report = import_report(checkpoint)              # None where nothing is quantized
plan = with_imports(make_plan(...), ...)        # their schemes come from the checkpoint
keeps_codes(job)                                # no: their values are quantized as any others
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
from llm_coreml.config import Job, WeightSettings
from llm_coreml.decoder import Decoder, DecoderSpec
from llm_coreml.decoder.matrices import Linear
from llm_coreml.errors import ConfigError, UnsupportedError
from llm_coreml.quantize.formats.schemes import (
    Codebook,
    IntChannel,
    IntGroup,
    Scheme,
    TableGroup,
)
from llm_coreml.quantize.formats.tensors import (
    codebook_tensor,
    integer_tensor,
    lookup_tensor,
)
from llm_coreml.quantize.plan.plan import QuantizationPlan, beside_blocks, matrices, use_of
from llm_coreml.rules import refused

_ORDER_ADVICE = (
    "which cannot be imported. Quantize with desc_act=False, or give the unquantized checkpoint "
    "and --calibrate."
)


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


def quantized_in(checkpoint: Checkpoint) -> str | None:
    """Return the formats of a checkpoint's quantized matrices, None where there are none."""
    return ", ".join(sorted(set(checkpoint.quantized().values()))) or None


def keeps_codes(job: Job) -> bool:
    """Say whether a quantized checkpoint is taken as it is: no setting chooses other codes."""
    weights = job.weights
    formats = (weights.bits, weights.size, weights.plan, weights.scheme)
    choices = (*formats, weights.codes_of, job.calibration.calibrate)
    plain = weights.rotate == weights.pt2e == "none"
    return plain and all(choice is None for choice in choices)


def left_as_is(job: Job) -> Job:
    """Return `job` for linear layers that a quantized checkpoint left unquantized: they stay so."""
    return replace(job, weights=replace(job.weights, scheme="none"))


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
    job: Job,
    spec: DecoderSpec,
    held: Mapping[str, PackedForm],
) -> QuantizationPlan:
    """Give each matrix that is quantized already the scheme that it has.

    Args:
        plan: For all others.
        job: As the user gave it.
        spec: Sizes of the decoder.
        held: How the checkpoint stores matrices, by their modules' names in the decoder.

    Raises:
        ConfigError: another format is asked for the token table or the head.
        UnsupportedError: the target refuses a scheme.
    """
    schemes = {name: _scheme(form, job) for name, form in held.items()}
    _refuse_misfits(job, schemes)
    linears = {name: schemes.get(name, plan.linear) for name, _ in matrices(spec)}
    linear = Counter(linears.values()).most_common(1)[0][0]
    embedding = schemes.get("embed_tokens", plan.embedding)
    exceptions = {name: found for name, found in linears.items() if found != linear}
    beside = {name: schemes.get(name, plan.embedding) for name, _ in beside_blocks(spec)}
    exceptions |= {name: found for name, found in beside.items() if found != embedding}
    lm_head = schemes.get("lm_head", plan.lm_head)
    if spec.tie_word_embeddings and "embed_tokens" in schemes:
        lm_head = embedding
    head = held.get("lm_head", held.get("embed_tokens") if spec.tie_word_embeddings else None)
    usual, weights = WeightSettings(), job.weights
    if weights.table != usual.table:
        _refuse_table(f"--embedding {weights.embedding}", held.get("embed_tokens"))
    if weights.lm_head != usual.lm_head:
        _refuse_table(f"--lm-head {weights.lm_head}", head)
    tied = spec.tie_word_embeddings and embedding == lm_head
    return QuantizationPlan(
        linear,
        embedding,
        lm_head,
        tied,
        0 if tied else plan.untied_bytes,
        MappingProxyType(exceptions),
    )


def imported_weight(packed: Packed, bits: int) -> torch.Tensor:
    """Return a quantized matrix as the lowering takes it, its codes held in `bits`."""
    levels = packed.levels
    if levels.tables is not None:
        return codebook_tensor(packed.codes.view(torch.uint8), levels.tables, bits)
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


def refuse_inexact(report: ImportReport, job: Job) -> None:
    """Raise UnsupportedError for an import that is not exact, unless `job` allows it."""
    if report.exactness == "inexact" and not job.weights.allow_inexact:
        raise UnsupportedError(
            f"These {report.format} weights cannot be stored for Core ML as they are: "
            f"{report.sentence}. Give --allow-inexact to take that, --bits 4 (or 8, or 16 for no "
            "quantization) to quantize their values again, or the unquantized checkpoint."
        )


def _scheme(form: PackedForm, job: Job) -> Scheme:
    """Return what a matrix is held in: its own bits, or the next integers where those fail."""
    scale_bits = job.precision.bits
    if form.block is not None:
        rows, columns = form.block
        return Codebook(form.bits, rows, scale_bits, columns)
    wide = 4 if form.bits <= 4 else 8
    if form.group_size is None:
        return IntChannel(wide, scale_bits, form.zero_point)
    if form.table:
        return TableGroup(form.bits, form.group_size, scale_bits)
    own = IntGroup(form.bits, form.group_size, scale_bits, form.zero_point)
    return replace(own, bits=wide) if refused(use_of(job, own)) else own


def _refuse_misfits(job: Job, schemes: Mapping[str, Scheme]) -> None:
    for name, scheme in schemes.items():
        for rule in [] if job.force else refused(use_of(job, scheme)):
            raise UnsupportedError(
                f"The checkpoint holds {name} as {scheme.label}, and --target {job.target.name} "
                f"does not take {scheme.name}: {rule.sentence}. Use --target gpu, give "
                "the unquantized checkpoint, or --force to export it all the same."
            )


def _refuse_table(asked: str, form: PackedForm | None) -> None:
    """Refuse a format for a table that has one."""
    if form is not None:
        raise ConfigError(
            f"{asked} chooses a format, but the checkpoint's is quantized already ({form.label}, "
            f"{form.bits} bit) and is taken as it is; drop {asked.split()[0]}."
        )
