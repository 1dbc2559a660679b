"""What a `.pte` offers to who runs it, as data: methods, lengths, states.

A lowering writes a program of this description, a manifest records it, and runners, the model card
and verification read it instead of knowing how one kind of program looks.

    description.method_for(8), description.seq_lengths, description.every_row
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from llm_coreml.artifact.method_plan import Constant
from llm_coreml.errors import ArtifactError
from llm_coreml.heads import LOGITS, Head

# The method that ExecuTorch's own runners call.
MAIN_METHOD = "forward"
# What coremltools calls the only function of a model.
MAIN_FUNCTION = "main"
# The constant method of ours that tells how far a sequence can go back, see `Description.rewinds`.
REWINDS = "get_max_rewind_len"
# The form whose methods take every length from the first that is told to the last.
RANGE = "range"
# What a language model's method takes, in order: S tokens, and how many came before them.
TOKENS, START_POS = "tokens", "start_pos"
# What a partition behind the first one takes in their place.
HIDDEN = "hidden"
# And where the last real token is, of programs that are given pads.
LAST_POS = "last_pos"
INPUTS = (f"{TOKENS} int64 [1, S]", f"{START_POS} int64 [1]")

# How a Core ML program calls a cache that it is given: this and the cache's name.
PAST = "past_"
# The same of a weight that is no constant of its own.
WEIGHTS = "weights_"


def _as_stored(value: Constant) -> Constant:
    """Return a constant as a file has it: ExecuTorch stores a list of one number as the number."""
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def _told(value: Constant) -> str:
    return "absent" if value is None else str(value)


def _shapes(texts: Iterable[str]) -> list[tuple[int, ...]]:
    """Return the sizes in texts such as `float16 [2, 8]`, where there are any."""
    sizes = (text.partition("[")[2] for text in texts)
    shapes = (tuple(map(int, re.findall(r"\d+", size))) for size in sizes)
    return [shape for shape in shapes if shape]


@dataclass(frozen=True)
class MethodForm:
    """A method that reads tokens.

    Attributes:
        inputs: Name, element type and shape of each argument, in order: `tokens int64 [1, S]`.
            Those behind `start_pos` are caches, all zero at first; what becomes of them is given
            behind the logits, in the same order, and belongs into the next call.
        output: Element type and shape of its logits: `float32 [1, 1, 32000]`; behind those that a
            head has chosen come their tokens, int32 of the same shape.
        seq_lengths: The lengths S that a call takes as they are, ascending. Others, up to the
            longest, are padded where the constant method `enable_dynamic_shape` says so; in a
            program of the form `RANGE` they are taken as they are, too.
        functions: The Core ML function of each partition, in the order in which they run; none in
            a method of another runtime.

    A partition is a part of the method that is given to Core ML as a whole. What tells it from the
    others is the function that it calls, so that `functions` describes them.
    """

    inputs: tuple[str, ...]
    output: str
    seq_lengths: tuple[int, ...]
    functions: tuple[str, ...]

    @property
    def caches(self) -> dict[str, str]:
        """Element type and shape of the caches that it takes and gives, by name."""
        return dict(text.split(" ", 1) for text in self.inputs[len(INPUTS) :])

    @property
    def partitions(self) -> int:
        """How many parts Core ML runs, one after the other."""
        return len(self.functions)


@dataclass(frozen=True)
class Partition:
    """A part of a method that is given to Core ML as a whole, one of several.

    Attributes:
        holds: What it has of the model, in words: `token table, layers 0 to 11`.
        weight_bytes: What its weights take, as foreseen.
    """

    holds: str
    weight_bytes: int


@dataclass(frozen=True)
class Description:
    """A program of a language model.

    Attributes:
        form: The kind of lowering: `enumerated`, `range`, `static`, `multifunction`, `twin`;
            `unknown` where a file does not tell.
        backend: What it is lowered for, a name in `targets.BACKENDS`.
        methods: The methods that read tokens, by name.
        every_row: A call gives a row of logits for each of its tokens, not for the last alone.
        states: Element type and shape of what it remembers, by name.
        context: Positions that it remembers.
        constant_methods: What ExecuTorch's LLM runners ask of it, by the method's name.
        why: What the form is for, and what was asked for; empty where nothing tells.
        head: What it gives of each row: all logits, or the likeliest tokens with theirs.
        partitions: What Core ML runs one after the other, where that is several programs.
    """

    form: str
    backend: str
    methods: Mapping[str, MethodForm]
    every_row: bool
    states: Mapping[str, str]
    context: int
    constant_methods: Mapping[str, Constant]
    why: str = ""
    head: Head = LOGITS
    partitions: tuple[Partition, ...] = ()

    @property
    def seq_lengths(self) -> tuple[int, ...]:
        """Every length that a call may have, ascending."""
        return tuple(sorted({n for form in self.methods.values() for n in form.seq_lengths}))

    @property
    def ranged(self) -> bool:
        """Whether lengths between the first and the last need no pads."""
        return self.form == RANGE

    @property
    def outputs_by_row(self) -> int:
        """How many of the first outputs of a call have a row for each of its tokens."""
        return len(self.head.gives) if self.every_row else 0

    @property
    def lengths(self) -> str:
        """Every length that a call may have, in words."""
        told = list(map(str, self.seq_lengths))
        return f"{told[0]} to {told[-1]}" if self.ranged else ", ".join(told)

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        """Tokens that end a text."""
        given = self.constant_methods.get("get_eos_ids")
        return tuple(map(int, given)) if isinstance(given, list) else ()

    @property
    def rewinds(self) -> int | None:
        """How many positions behind the furthest one a sequence can be taken up again.

        None is any number: nothing is written over. Layers with windows may keep the last
        positions alone.
        """
        given = self.constant_methods.get(REWINDS)
        return given if isinstance(given, int) else None

    @property
    def state_shapes(self) -> list[tuple[int, ...]]:
        """The sizes of what it remembers, which has one size at least."""
        return _shapes(self.states.values())

    @property
    def states_by_program(self) -> list[list[tuple[int, ...]]]:
        """The same of each partition, whose states are called by its first layer."""
        parts: dict[str, list[tuple[int, ...]]] = {}
        for name, shape in zip(self.states, self.state_shapes, strict=True):
            found = re.match(r"layers_[0-9]+_", name)
            parts.setdefault(found[0] if found else "", []).append(shape)
        return list(parts.values())

    @property
    def cache_shapes(self) -> list[tuple[int, ...]]:
        """The sizes of what is handed from call to call."""
        return _shapes(self.caches.values())

    @property
    def caches(self) -> dict[str, str]:
        """Element type and shape of what its methods take and give of the tokens before."""
        return self.methods[self.main].caches

    @property
    def main(self) -> str:
        """The method that reads single tokens, and so can read everything."""
        return self.method_for(1)

    def check_one_sequence(self) -> None:
        """Refuse several methods that remember, to be called in turns for one sequence.

        Raises:
            ArtifactError: as said, or they do not take the same caches.
        """
        if any(form.caches != self.caches for form in self.methods.values()):
            raise ArtifactError(
                f"The program's methods {', '.join(self.methods)} take different caches, so that "
                "no sequence can pass from one to the other; export again."
            )
        if len(self.methods) > 1 and self.states:
            raise ArtifactError(
                f"The program's methods {', '.join(self.methods)} have states, which are each "
                "method's own, so that no sequence can pass from one to the other; export a "
                "program with one method."
            )

    def check_constants(self, found: Mapping[str, Constant], path: Path) -> None:
        """Hold what runners will be told against what the file at `path` tells them.

        Args:
            found: What the file's constant methods give.
            path: The file.

        Raises:
            ArtifactError: a constant method is missing, too many, or gives something else.
        """
        told = {name: _as_stored(value) for name, value in self.constant_methods.items()}
        for name in sorted(told.keys() | found.keys()):
            # True is 1, and 8.0 is 8, to Python.
            if repr(told.get(name)) != repr(found.get(name)):
                raise ArtifactError(
                    f"'{path}' is not what the manifest describes: {name} is "
                    f"{_told(found.get(name))}, not {_told(told.get(name))}. Export again."
                )

    def method_for(self, length: int) -> str:
        """Return the method that reads `length` tokens with the fewest pads.

        It is the first one, which refuses, if none does.
        """
        fitting = {
            name: min(own for own in form.seq_lengths if own >= length)
            for name, form in self.methods.items()
            if form.seq_lengths[-1] >= length
        }
        return min(fitting, key=fitting.__getitem__, default=next(iter(self.methods)))
