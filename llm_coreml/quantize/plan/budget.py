"""What mixed formats may take: the formats of every matrix, and the bits for all of them together.

options = mixed_options(job, spec)
options["layers.0.mlp.down_proj"]                      # (Codebook(2, 16), ..., IntChannel(8))
limit = matrix_bits(job, spec, options)             # what --bits 3.5 or --size 600MB leaves
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import torch
from torch import nn

from llm_coreml.config import Job
from llm_coreml.config.values import MOST_WEIGHTS, SKIP_HEAD
from llm_coreml.decoder import DecoderSpec, skeleton
from llm_coreml.decoder.position_tables import position_tables
from llm_coreml.errors import UnsupportedError
from llm_coreml.quantize.formats.schemes import Scheme, Unquantized
from llm_coreml.quantize.plan.flags import linear_scheme
from llm_coreml.quantize.plan.plan import (
    QuantizationPlan,
    beside_blocks,
    make_plan,
    matrices,
    recovery_bits,
    schemes_by_pattern,
    use_of,
)
from llm_coreml.rules import refused

# By rising size. Codebooks of 1 bit lose everything, those of 8 bits more bytes than int8.
_MIXED = (
    ("codebook", 2),
    ("codebook", 3),
    ("codebook", 4),
    ("int4-group", 4),
    ("codebook", 6),
    ("int8-channel", 8),
)
# What a program takes beside its numbers: operations, names, alignment. Measured were 21 to 24 kB,
# and 30.0 to 31.6 kB per layer, at hidden sizes of 64 and 256.
_PROGRAM_BYTES, _LAYER_BYTES = 28 << 10, 34 << 10
# And for a product beside a matrix, of which 1.4 kB were measured.
_PRODUCT_BYTES = 2 << 10

Options = Mapping[str, tuple[Scheme, ...]]


def mixed_options(job: Job, spec: DecoderSpec) -> Options:
    """Return what each linear layer of the blocks may be stored as, by rising size.

    What a pattern of `--scheme` fits has one format, the pattern's. For the others these are the
    formats that the target is not known to refuse and that hold a matrix of the layer's shape, with
    `--group-size` and `--codebook-rows` as given.
    """
    schemes = []
    for name, bits in _MIXED:
        weights = replace(job.weights, size=None, plan=None, scheme=name, bits=bits)
        # What --codebook-scale adds to a format is refused for its own reason.
        plain = linear_scheme(replace(job, weights=replace(weights, codebook_scale=False)))
        if not refused(use_of(job, plain)):
            schemes.append(linear_scheme(replace(job, weights=weights)))
    named = schemes_by_pattern(job, spec)
    return {
        name: (named[name].scheme,)
        if name in named
        else tuple(scheme for scheme in schemes if _holds(scheme, name, shape))
        for name, shape in matrices(spec)
    }


def _holds(scheme: Scheme, name: str, shape: tuple[int, int]) -> bool:
    try:
        scheme.check(name, shape)
    except UnsupportedError:
        return False
    return True


def matrix_bits(job: Job, spec: DecoderSpec, options: Options) -> int:
    """Return the bits that `job` leaves for the linear layers of the blocks.

    Raises:
        UnsupportedError: even the smallest formats need more, or the largest less.
    """
    shapes = dict(matrices(spec))

    def total(choose: Callable[[Iterable[int]], int]) -> int:
        return sum(choose(s.stored_bits(shapes[name]) for s in options[name]) for name in options)

    least, most = total(min), total(max)
    if job.weights.size is None:
        weights = sum(rows * columns for rows, columns in shapes.values())
        limit = math.floor((job.weights.bits or 0) * weights)
        if not least <= limit <= most:
            # Rounded inwards: both can be asked for.
            low, high = math.ceil(100 * least / weights), math.floor(100 * most / weights)
            raise UnsupportedError(
                f"--bits {job.weights.bits} cannot be reached: mixed formats take "
                f"{low / 100:.2f} to {high / 100:.2f} bits per weight of this model on --target "
                f"{job.target.name}, scales and tables included; give a number between."
            )
        return limit
    smallest = {name: schemes[0] for name, schemes in options.items()}
    rest = other_bytes(job, spec, make_plan(job, spec, smallest))
    limit = 8 * (job.weights.size - rest)
    if limit < least:
        raise UnsupportedError(
            f"--size {job.weights.size:,} bytes cannot be reached: mixed formats make this model "
            f"{rest + -(-least // 8):,} to {rest + -(-most // 8):,} bytes on --target "
            f"{job.target.name}, {rest:,} of them for the tables and the program; give a size "
            "between, or smaller tables such as --embedding int4-channel."
        )
    return limit


def other_bytes(job: Job, spec: DecoderSpec, plan: QuantizationPlan) -> int:
    """Return what a `.pte` takes beside the linear layers of the blocks, at most."""
    table = (spec.vocab_size, spec.hidden_size)
    programs = _programs(job)
    bits = plan.embedding.stored_bits(table)
    bits += sum(plan.scheme_of(name).stored_bits(shape) for name, shape in beside_blocks(spec))
    # Where the token table and a head that is the same are apart, each of them has it.
    once = plan.tied and programs == 1 and not job.skip_ops
    for _, shape in matrices(spec) if job.calibration.recover else ():
        bits += recovery_bits(job.calibration.recovery_rank, shape) + 8 * _PRODUCT_BYTES
    skipped = Unquantized(32) if SKIP_HEAD in job.skip_ops else plan.lm_head
    bits += 0 if once else skipped.stored_bits(table)
    number, context = job.precision.bits // 8, job.shapes.context
    # What is looked up by positions, and an int32 for every position.
    with torch.device("meta"):
        looked_up = sum(table.numel() for table in position_tables(spec, context).values())
    numbers = (_vectors(spec) + programs * looked_up) * number + programs * context * 4
    return -(-bits // 8) + numbers + programs * _PROGRAM_BYTES + len(spec.layers) * _LAYER_BYTES


def _programs(job: Job) -> int:
    """Return how many partitions there are at most; each is filled by half at least."""
    size, budget = job.weights.size or 0, job.partition_size or MOST_WEIGHTS
    return 1 + len(job.split) + (2 * size // budget if size > budget else 0)


def _vectors(spec: DecoderSpec) -> int:
    """Return how many numbers norms and biases hold."""
    decoder = skeleton(spec)
    tables = (nn.Linear, nn.Embedding)
    held = {m.weight for m in decoder.modules() if isinstance(m, tables)}
    return sum(p.numel() for p in decoder.parameters() if not any(p is weight for weight in held))
