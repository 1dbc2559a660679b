"""A program's logits for every token, in chunks, whatever rows it gives.

    reader = EveryRow(runner)
    reader.logits([1, 42, 7])          # float32 [3, vocab]
    prove(reader, runner, [1, 42, 7])  # None, or how far a row is from the program's own

A program that slices out the last row is run without that slice, see `reference.program.widened`,
so that a text is read in as few calls as its lengths allow. What that gives is proved: at positions
of a text the program itself, called so that it ends there, must give the same bits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import final

import torch

from llm_coreml.errors import ArtifactError
from llm_coreml.reference.method.method import LoadedMethod
from llm_coreml.reference.program.coreml_program import CoreMLProgram
from llm_coreml.reference.program.widened import Rows
from llm_coreml.runtime.reference import ReferenceRunner
from llm_coreml.runtime.runner import Runner


class CannotWidenError(Exception):
    """The program slices its last row in a way that is not known, or takes no more rows."""


@final
class EveryRow(Runner):
    """A reference runner whose calls give a row for every token.

    Args:
        runner: What is read with; its own programs are left as they are, but its cache is used.

    Raises:
        CannotWidenError: a program that gives one row cannot give more.
    """

    def __init__(self, runner: ReferenceRunner) -> None:
        super().__init__()
        self._runner = runner
        self._wide: dict[CoreMLProgram, CoreMLProgram] = {}
        self._logits: dict[CoreMLProgram, str] = {}
        if not runner.every_row:
            for name, method in runner.methods.items():
                if runner.description.methods[name].seq_lengths != (1,):
                    program, wide = _widest(method, runner.vocab_size)
                    self._wide[program] = wide
                    self._logits[program] = program.outputs[0].name
        self._rows: torch.Tensor | None = None
        self.label = runner.label
        self.context, self.vocab_size = runner.context, runner.vocab_size
        self.seq_lengths, self.rewinds = runner.seq_lengths, runner.rewinds
        self.every_row = True
        # A method that pads takes what is left of a text in one call.
        self.ranged = runner.ranged or pads(runner)
        self._clear()

    def _forward(self, tokens: torch.Tensor, start_pos: torch.Tensor) -> torch.Tensor:
        self._rows = None
        with self._answered():
            given = self._runner._forward(tokens, start_pos)
        rows = given if self._rows is None else self._rows
        return rows[:, : tokens.shape[1]].to(torch.float32).cpu()

    def _clear(self) -> None:
        self._runner._clear()
        for program in self._wide.values():
            program.reset()

    @contextlib.contextmanager
    def _answered(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for method in self._runner.methods.values():
                stack.enter_context(method.answered(self._answer))
            yield

    def _answer(
        self, program: CoreMLProgram, given: Mapping[str, torch.Tensor]
    ) -> Mapping[str, torch.Tensor]:
        """Return what the widened program gives, its rows kept and the last one passed on."""
        wide = self._wide.get(program)
        if wide is None:
            return program(given)
        outputs, name = wide(given), self._logits[program]
        self._rows = outputs[name]
        return {**outputs, name: self._rows[:, -1:]}


def _widest(method: LoadedMethod, width: int) -> tuple[CoreMLProgram, CoreMLProgram]:
    """Return the program of a method that gives the logits, and the same without its slice.

    Of several programs in a row it must be the last that takes the last row: the rows of another
    are no logits.
    """
    program = method.programs[-1]
    wide = program.widened()
    if wide is None or program.outputs[0].shape[-1:] not in ((), (width,)):
        raise CannotWidenError(
            f"the program that gives the logits of method '{method.name}' takes no last row that "
            "it could do without"
        )
    return program, wide


def pads(runner: ReferenceRunner) -> bool:
    """Return whether the methods pad a chunk that is shorter than a length."""
    longest = runner.seq_lengths[-1]
    if longest < 3 or 1 not in runner.seq_lengths:
        return longest > 1
    method = runner.methods[runner.description.method_for(longest)]
    tokens = torch.zeros(1, longest - 1, dtype=torch.int64)
    rest = runner._caches.values()
    try:
        given = method.inputs_of([], tokens, torch.zeros(1, dtype=torch.int64), *rest)
    except ArtifactError:
        return False
    finally:
        method.reset()
    return any(value.dim() == 2 and value.shape[1] == longest for value in given.values())


def prove(reader: EveryRow, runner: ReferenceRunner, tokens: Sequence[int]) -> str | None:
    """Hold rows of a reader against what the program itself gives, bit by bit.

    The program is called so that it ends at a row: at the ends of the first two calls, and where
    methods pad, inside of the first. It computes in the same mode and by the same operations, but
    a product of one row among as many as the call has, for sums to come in the same order.

    Args:
        reader: Made of the runner.
        runner: The program itself.
        tokens: A text.

    Returns:
        None if all are equal, else the first that differs and by how much, in words.
    """
    rows = Rows()
    steady = {program: program.steady(rows) for program in runner.programs}
    longest = runner.seq_lengths[-1]
    found = reader.logits(tokens[: 2 * longest])

    def answer(
        program: CoreMLProgram, given: Mapping[str, torch.Tensor]
    ) -> Mapping[str, torch.Tensor]:
        rows.count = max((v.shape[1] for v in given.values() if v.dim() in (2, 3)), default=1)
        return steady[program](given)

    with contextlib.ExitStack() as stack:
        for method in runner.methods.values():
            stack.enter_context(method.answered(answer))
        for ends in _ends(len(found), longest, reader.ranged):
            runner.reset()
            for program in steady.values():
                program.reset()
            for end in ends:
                row = runner.step(tokens[runner.position : end])[-1]
                if not torch.equal(row, found[end - 1]):
                    largest = float((row - found[end - 1]).abs().max())
                    return f"row {end - 1} is another than the program's own, by up to {largest:g}"
    return None


def _ends(count: int, longest: int, padding: bool) -> list[list[int]]:
    """Return where calls end, for each reading of a text of `count` tokens."""
    whole = [end for end in (longest, 2 * longest) if end <= count]
    inside = min(count, longest) * 2 // 3
    return [*([whole] if whole else []), *([[inside]] if padding and inside else [])]
