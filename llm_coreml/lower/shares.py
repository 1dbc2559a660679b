"""Which partitions a decoder is cut into: by bytes of weights, and by what stands alone.

    cut = cut_of(job, spec, plan)
    cut.shares, cut.sizes, cut.why          # one share of everything, if nothing asks for more

Partitions are filled in the order in which they run, each with as much as the budget allows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from llm_coreml.artifact.description import Partition
from llm_coreml.config import Job
from llm_coreml.config.values import MOST_WEIGHTS, SKIP_HEAD, SKIP_TABLE
from llm_coreml.decoder import Decoder, DecoderSpec
from llm_coreml.decoder.parts import Share
from llm_coreml.decoder.spec import Extent
from llm_coreml.decoder.states import state_specs
from llm_coreml.errors import ConfigError, UnsupportedError
from llm_coreml.quantize.formats.schemes import IntChannel, Unquantized
from llm_coreml.quantize.plan.plan import (
    QuantizationPlan,
    beside_blocks,
    matrices,
    recovery_bits,
)
from llm_coreml.targets import BACKENDS

# What a weight file has beside numbers, of codes and of scales: a head, and room up to the next.
_ROOM = 256


@dataclass(frozen=True)
class Cut:
    """How a decoder is cut.

    Attributes:
        shares: What each partition has, in the order in which they run.
        sizes: Bytes of weights of each.
        why: What asks for several; empty if there is one.
        handed: The weights are inputs of the programs.
    """

    shares: tuple[Share, ...]
    sizes: tuple[int, ...] = (0,)
    why: str = ""
    handed: bool = False

    @property
    def apart(self) -> bool:
        """Whether it is other than the decoder as a whole, with its weights."""
        return len(self.shares) > 1 or self.handed or bool(self.outside)

    @property
    def outside(self) -> str:
        """What is left to kernels of ExecuTorch, in words; empty if nothing is."""
        first, last = self.shares[0], self.shares[-1]
        found = ["its token table"] * first.table_outside + [
            "the head's matrix"
        ] * last.head_outside
        return " and ".join(found)

    def states(self, spec: DecoderSpec, extent: Extent) -> list[list[tuple[int, ...]]]:
        """Return the sizes of what each program remembers."""
        return [
            [state.shape for state in state_specs(spec, extent, share.layers)]
            for share in self.shares
        ]

    @property
    def partitions(self) -> tuple[Partition, ...]:
        """What a description says of them; nothing of a single one."""
        if len(self.shares) == 1:
            return ()
        pairs = zip(self.shares, self.sizes, strict=True)
        return tuple(Partition(share.told, size) for share, size in pairs)


def whole(spec: DecoderSpec) -> Cut:
    """Return the cut into one."""
    return Cut((Share(range(len(spec.layers)), embedding=True, head=True),))


def cut_of(job: Job, spec: DecoderSpec, plan: QuantizationPlan) -> Cut:
    """Return the partitions that settings ask for, or that the weights need.

    Args:
        job: Settings.
        spec: Sizes of the decoder.
        plan: What its matrices are stored as.

    Raises:
        ConfigError: a part that cannot be cut is larger than the budget.
    """
    if BACKENDS[job.backend].stores_dense:
        return whole(spec)
    _check_skipped(job, spec, plan)
    handed = job.constants == "inputs"
    if handed:
        _check_plain(plan, spec)
    pieces, beside = _pieces(job, spec, plan)
    tied = pieces[-1].size if plan.tied and not job.skip_ops else 0
    total = sum(piece.size for piece in pieces) + beside - tied
    if not job.split and total <= (job.partition_size or MOST_WEIGHTS):
        return Cut((_without(whole(spec).shares[0], job),), handed=handed)
    budget = job.partition_size or (None if total <= MOST_WEIGHTS else MOST_WEIGHTS)
    if job.partition_size is not None:
        _check_budget(pieces, beside, job.partition_size)
    filled = _filled(pieces, beside, budget, job.split)
    sizes = tuple(sum(piece.size for piece in part) + _shared(part, beside) for part in filled)
    return Cut(tuple(map(_joined, filled)), sizes, _reason(job, total), handed)


@dataclass(frozen=True)
class _Piece:
    """What is never cut.

    Attributes:
        share: What it is of the decoder.
        size: Bytes of its weights.
    """

    share: Share
    size: int


def _pieces(job: Job, spec: DecoderSpec, plan: QuantizationPlan) -> tuple[list[_Piece], int]:
    """Return all pieces in order, and the bytes of the tables that all layers read."""
    with torch.device("meta"):
        decoder = Decoder(spec, job.shapes.context, longest=job.shapes.longest)
    number = job.precision.bits // 8
    sizes: dict[str, int] = {}
    for name, module in decoder.named_modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            rows, columns = module.weight.shape
            bits = plan.scheme_of(name).stored_bits((rows, columns))
            cut = job.cuts.of_table if isinstance(module, nn.Embedding) else job.cuts.of_linear
            # Each part is stored by itself.
            further = len(cut(rows, unit=1)) - 2
            sizes[f"{name}.weight"] = -(-bits // 8) + _ROOM * further
    for name, shape in matrices(spec) if job.calibration.recover else ():
        # Two factors, each cut as all that has so many rows.
        rank = min(job.calibration.recovery_rank, *shape)
        parts = sum(len(job.cuts.of_linear(rows, unit=1)) - 1 for rows in (rank, shape[0]))
        sizes[f"{name}.up"] = recovery_bits(rank, shape) // 8 + _ROOM * parts
    for name, parameter in decoder.named_parameters():
        sizes.setdefault(name, parameter.numel() * number)
    found: dict[str, int] = {}
    for name, size in sizes.items():
        place = name.split(".")[1] if name.startswith("layers.") else _end_of(name)
        found[place] = found.get(place, 0) + size + _ROOM
    layers = [
        _Piece(Share(together), sum(found[str(index)] for index in together))
        for together in _inseparable(spec)
    ]
    first = _Piece(Share(embedding=True), found["embedding"])
    last = _Piece(Share(head=True), found["head"])
    # What a skipped matrix leaves before the layers, or behind them, is done with those beside it.
    if SKIP_TABLE in job.skip_ops:
        rest = first.size - sizes["embed_tokens.weight"]
        share = _without(replace(layers[0].share, embedding=True), job)
        layers[0] = _Piece(share, layers[0].size + rest)
    if SKIP_HEAD in job.skip_ops:
        rest = last.size - sizes["lm_head.weight"]
        share = _without(replace(layers[-1].share, head=True), job)
        layers[-1] = _Piece(share, layers[-1].size + rest)
    # Tables of positions, and of what follows from them, lie beside the modules.
    beside = decoder.buffers(recurse=False)
    tables = sum(buffer.numel() * buffer.element_size() for buffer in beside)
    before = [] if SKIP_TABLE in job.skip_ops else [first]
    behind = [] if SKIP_HEAD in job.skip_ops else [last]
    return [*before, *layers, *behind], tables


def _without(share: Share, job: Job) -> Share:
    """Return a share whose ends, where it has them, lie outside as settings ask."""
    return replace(
        share,
        table_outside=share.embedding and SKIP_TABLE in job.skip_ops,
        head_outside=share.head and SKIP_HEAD in job.skip_ops,
    )


def _check_skipped(job: Job, spec: DecoderSpec, plan: QuantizationPlan) -> None:
    """Refuse matrices that the kernels outside of Core ML do not read."""
    if SKIP_TABLE in job.skip_ops and spec.per_layer is not None:
        raise UnsupportedError(
            f"--skip-ops {SKIP_TABLE}: this model has a second token table, a part of which each "
            "layer is given; its tables stay in Core ML. Leave it out."
        )
    table, head = plan.embedding, plan.lm_head
    codes = isinstance(table, IntChannel) and (table.bits, table.zero_point) == (8, "none")
    read = codes or isinstance(table, Unquantized)
    if SKIP_TABLE in job.skip_ops and not read:
        raise ConfigError(
            f"--skip-ops {SKIP_TABLE} has ExecuTorch's kernels read the token table, and these "
            f"read int8 per channel or plain numbers, no {table.label}; give --embedding "
            "int8-channel or none."
        )
    if SKIP_HEAD in job.skip_ops and not isinstance(head, Unquantized):
        raise ConfigError(
            f"--skip-ops {SKIP_HEAD} has ExecuTorch's kernels read the head's matrix, and these "
            f"read plain numbers, no {head.label}; give --lm-head none."
        )


def _check_plain(plan: QuantizationPlan, spec: DecoderSpec) -> None:
    """Refuse weights that cannot be inputs of a program, which are plain numbers."""
    named = [name for name, _ in (*beside_blocks(spec), *matrices(spec))]
    for name in ("embed_tokens", *named, "lm_head"):
        scheme = plan.scheme_of(name)
        if not isinstance(scheme, Unquantized):
            raise UnsupportedError(
                f"--constants inputs hands Core ML every weight in each call, and {name} would be "
                f"stored as {scheme.label}: an input of Core ML is plain fp16 or fp32 numbers; "
                "codes are expanded where they are constants of the program alone. Give --bits "
                "16, or leave --constants delegate."
            )


def _end_of(name: str) -> str:
    return "head" if name.partition(".")[0] in ("norm", "lm_head") else "embedding"


def _inseparable(spec: DecoderSpec) -> Iterator[range]:
    """Yield runs of layers: who attends to another's keys and values is in the same partition."""
    first = 0
    for index in range(1, len(spec.layers) + 1):
        later = (layer.mixer.shares for layer in spec.layers[index:])
        if not any(owner is not None and owner < index for owner in later):
            yield range(first, index)
            first = index


def _shared(part: Sequence[_Piece], beside: int) -> int:
    """Return the bytes of the tables that a partition of these pieces has, too."""
    return beside if any(piece.share.layers for piece in part) else 0


def _check_budget(pieces: Sequence[_Piece], beside: int, budget: int) -> None:
    """Refuse a budget that one piece exceeds."""
    needed = [piece.size + _shared([piece], beside) for piece in pieces]
    largest = max(range(len(pieces)), key=needed.__getitem__)
    if needed[largest] > budget:
        several = len(pieces[largest].share.layers) > 1
        why = ", which share keys and values," if several else ""
        raise ConfigError(
            f"--partition-size is {budget:,} bytes, and {pieces[largest].share.told}{why} takes "
            f"{needed[largest]:,} alone; give --partition-size {needed[largest]} or more, or "
            "fewer --bits."
        )


def _filled(
    pieces: Sequence[_Piece], beside: int, budget: int | None, split: Sequence[str]
) -> list[list[_Piece]]:
    """Return the pieces of each partition."""
    filled: list[list[_Piece]] = [[]]
    for piece in pieces:
        part = [*filled[-1], piece]
        size = sum(each.size for each in part) + _shared(part, beside)
        alone = ("embedding" in split and filled[-1] and filled[-1][0].share.embedding) or (
            "head" in split and piece.share.head
        )
        if filled[-1] and (alone or (budget is not None and size > budget)):
            filled.append([piece])
        else:
            filled[-1] = part
    return filled


def _joined(part: Sequence[_Piece]) -> Share:
    """Return the share of pieces in a row."""
    layers = [index for piece in part for index in piece.share.layers]
    return Share(
        range(layers[0], layers[-1] + 1) if layers else range(0),
        embedding=any(piece.share.embedding for piece in part),
        table_outside=any(piece.share.table_outside for piece in part),
        head_outside=any(piece.share.head_outside for piece in part),
        head=any(piece.share.head for piece in part),
    )


def _reason(job: Job, total: int) -> str:
    """Return what asks for several partitions."""
    asked = [f"--partition-size {job.partition_size}"] if job.partition_size else []
    asked += [f"--split {','.join(job.split)}"] if job.split else []
    if not job.partition_size and total > MOST_WEIGHTS:
        return f"its weights take {total:,} bytes, more than the 2 GB of one delegate"
    return f"{' and '.join(asked)} {'ask' if len(asked) > 1 else 'asks'} for it"
