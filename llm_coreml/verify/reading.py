"""A text as the quantized model reads it, once for all comparisons.

reading = read_text(decoder, tokens, "held-out text", plan, every_row=False, natural=True)
reading.rows(start=0, first=71, last=72)      # logits after token 71
reading.later                                  # what is remembered before plan.start
reading.plain_fp16                             # the noise that fp16 makes of it
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from llm_coreml.cuts import WHOLE, Cuts
from llm_coreml.decoder import Decoder
from llm_coreml.fidelity import kl_divergence
from llm_coreml.lower.cut_rows import cut_rows
from llm_coreml.verify.cached_text import CachedText, LaterCache
from llm_coreml.verify.judge import Reading, logits_of, read_together
from llm_coreml.verify.passes import Pass, Plan
from llm_coreml.verify.verification import PlainFp16
from llm_coreml.verify.weights import Content, Digests

# Rows of a text that plain fp16 is compared on, at least those that an artifact is.
_COMPARED = 32


@dataclass(frozen=True, eq=False)
class ReadText:
    """What the quantized model says of a text.

    Attributes:
        text: What it is, for the record.
        plan: How an artifact is to read it.
        tokens: The text; position p holds token p of it, from the end on the first again.
        logits: Where a pass begins -> which of its tokens -> the logits after it.
        later: Every state before the start of `plan`, by name; None if the cache is of zeros there.
        plain_fp16: The noise of plain fp16; None if that is not known.
        in_fp16: Whether the artifact computes in fp16, so that such noise is its own.
        contents: What tells each tensor of the model from others, by name.
        parts: The same of the parts in which it may lie in a program, see `check_weights`.
        largest: The largest number that any block left in the residual stream.
    """

    text: str
    plan: Plan
    tokens: Sequence[int]
    logits: Mapping[int, Mapping[int, torch.Tensor]]
    later: Mapping[str, torch.Tensor] | None = None
    plain_fp16: PlainFp16 | None = None
    in_fp16: bool = True
    contents: Mapping[str, Content] = field(default_factory=dict)
    largest: float = 0.0
    parts: Mapping[str, Sequence[Sequence[Content]]] = field(default_factory=dict)

    def tokens_of(self, part: Pass) -> list[int]:
        """Return what a pass reads."""
        return _tokens_at(self.tokens, part.start, part.count)

    def rows(self, start: int, first: int, last: int) -> torch.Tensor:
        """Return the logits after tokens `first` to `last` - 1, read from position `start`."""
        return torch.stack([self.logits[start][row] for row in range(first, last)])


def compared_rows(passes: Iterable[Pass], every_row: bool) -> dict[int, list[int]]:
    """Return which tokens there are logits after, by where their passes begin.

    Args:
        passes: What is read.
        every_row: Whether a call gives every row of a chunk, or the last.
    """
    found: dict[int, set[int]] = {}
    for part in passes:
        rows = found.setdefault(part.start, set())
        for call in part.calls:
            rows.update(range(call.first if every_row else call.end - 1, call.end))
    return {start: sorted(rows) for start, rows in found.items()}


def read_text(
    decoder: Decoder,
    tokens: Sequence[int],
    text: str,
    plan: Plan,
    *,
    every_row: bool,
    natural: bool,
    in_fp16: bool,
    cuts: Cuts = WHOLE,
) -> ReadText:
    """Read a text with the quantized model.

    Args:
        decoder: The model.
        tokens: As many as `plan` says.
        text: What it is, for the record.
        plan: How an artifact is to read it.
        every_row: Whether it gives every row of a chunk, or the last.
        natural: Whether it can be told what to remember before a late position; else that is
            nothing but zeros, and the noise of plain fp16 is not measured.
        in_fp16: Whether it computes in fp16.
        cuts: Which of its matrices are cut.
    """
    rows = compared_rows((*plan.unrounded, *plan.declared), every_row)
    first = CachedText(decoder)
    later = LaterCache(decoder, first if natural else None, plan.start)
    texts = {0: Reading(0, tokens[: plan.tokens], first)}
    if plan.start:
        texts[plan.start] = _late(decoder, tokens, plan, later)
    halves = _halves(decoder, texts, plan, later) if natural else {}
    pairs = [(texts[start], half) for start, half in halves.items()]
    growth = _Growth(list(texts.values()), pairs, decoder.spec.hidden_size)
    digests = Digests(cut_rows(decoder, cuts))
    everything = [*texts.values(), *halves.values()]
    read_together(decoder, everything, growth.note, on_weight=digests.add)
    exact = [texts[start].states[found] for start, found in rows.items()]
    chosen = _spread(plan, halves, every_row)
    beside = [texts[start].states[found] for start, found in chosen.items()]
    rounded = [halves[start].states[found] for start, found in chosen.items()]
    tied = decoder.lm_head.weight is decoder.embed_tokens.weight

    def note(name: str, weight: torch.Tensor) -> None:
        digests.add("embed_tokens.weight" if tied else name, weight)

    found = logits_of(decoder, [*exact, *beside], rounded, on_weight=note)
    logits = {
        start: dict(zip(wanted, values.unbind(), strict=True))
        for (start, wanted), values in zip(rows.items(), found, strict=False)
    }
    plain = None
    if halves:
        of_halves = found[len(exact) :]
        plain = _noise(of_halves[: len(beside)], of_halves[len(beside) :], growth.largest_step)
    states = later.states if natural else None
    contents = digests.contents(decoder)
    told = growth.largest_number, digests.parts(decoder)
    return ReadText(text, plan, tokens, logits, states, plain, in_fp16, contents, *told)


def _tokens_at(tokens: Sequence[int], start: int, count: int) -> list[int]:
    return [tokens[place % len(tokens)] for place in range(start, start + count)]


def _late(decoder: Decoder, tokens: Sequence[int], plan: Plan, later: LaterCache) -> Reading:
    """Return what is read from the start of `plan` on."""
    count = max(part.count for part in plan.unrounded if part.start)
    return Reading(plan.start, _tokens_at(tokens, plan.start, count), CachedText(decoder, later))


def _halves(
    decoder: Decoder, texts: Mapping[int, Reading], plan: Plan, later: LaterCache
) -> dict[int, Reading]:
    """Return what is read in plain fp16: as much of each text as an artifact reads so."""
    found = {}
    for start, text in texts.items():
        count = max(part.count for part in plan.declared if part.start == start)
        cached = CachedText(decoder, later if start else None)
        found[start] = Reading(start, text.tokens[:count], cached, half=True)
    return found


class _Growth:
    """How the error of the residual stream grows from layer to layer.

    Args:
        texts: What is read without rounding.
        pairs: Those of them that have one, beside the same in plain fp16.
        hidden: Width of the residual stream, beside which blocks may hand on more.
    """

    def __init__(
        self, texts: Sequence[Reading], pairs: Sequence[tuple[Reading, Reading]], hidden: int
    ) -> None:
        self.largest_number = 0.0
        self._texts = texts
        self._pairs = pairs
        self._hidden = hidden
        self._errors = [0.0]

    def note(self) -> None:
        """Take the error that a block has just left, and the largest number."""
        peaks = [text.states[:, : self._hidden].abs().max() for text in self._texts]
        # Of tensors, whose max keeps NaN.
        self.largest_number = float(torch.stack([torch.tensor(self.largest_number), *peaks]).max())
        errors = []
        for text, half in self._pairs:
            found = half.states[:, : self._hidden]
            exact = text.states[: len(found), : self._hidden]
            errors.append((found - exact).norm(dim=-1) / exact.norm(dim=-1))
        if errors:
            self._errors.append(float(torch.cat(errors).mean()))

    @property
    def largest_step(self) -> int:
        """The layer with the largest growth, or the first without a number."""
        steps = torch.tensor(self._errors).diff()
        lost = (~steps.isfinite()).nonzero()
        return int(lost[0]) if len(lost) else int(steps.argmax())


def _spread(plan: Plan, halves: Mapping[int, Reading], every_row: bool) -> dict[int, list[int]]:
    """Return which rows of each text in plain fp16 are compared.

    With few calls few rows of an artifact are; the largest error of few is a matter of chance.
    """
    rows, found = compared_rows(plan.declared, every_row), {}
    for start, half in halves.items():
        spread = range(0, len(half.tokens), max(1, len(half.tokens) // _COMPARED))
        found[start] = sorted({*rows[start], *spread})
    return found


def _noise(exact: Sequence[torch.Tensor], rounded: Sequence[torch.Tensor], layer: int) -> PlainFp16:
    wanted, found = torch.cat(list(exact)), torch.cat(list(rounded))
    error = float((found - wanted).abs().max() / wanted.abs().max())
    return PlainFp16(len(wanted), error, float(kl_divergence(wanted, found).mean()), layer)
