"""The Core ML program inside a `.pte` as a runner, on any machine.

ReferenceRunner(folder / "model.pte").logits([1, 42, 7])
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

import torch

from llm_coreml.artifact.description import (
    HIDDEN,
    INPUTS,
    MAIN_METHOD,
    PAST,
    RANGE,
    WEIGHTS,
    Description,
    MethodForm,
)
from llm_coreml.errors import ArtifactError
from llm_coreml.reference.load import load_methods
from llm_coreml.reference.method.memory import dtype_of
from llm_coreml.reference.method.method import LoadedMethod
from llm_coreml.reference.observe.series import Series
from llm_coreml.reference.program.constants import PackedWeight
from llm_coreml.reference.program.coreml_program import CoreMLProgram
from llm_coreml.reference.program.execution import Execution
from llm_coreml.reference.program.interface import INTERFACE_TYPES
from llm_coreml.reference.program.side_by_side import OnRows
from llm_coreml.runtime.carried_caches import carried
from llm_coreml.runtime.chosen import spread
from llm_coreml.runtime.divided_states import divided, of_program, own_states
from llm_coreml.runtime.runner import Runner
from llm_coreml.runtime.signatures import as_given, check_signature, head_of

# What a program gives, by name.
Outputs = Mapping[str, torch.Tensor]
# What a device is meant to compute, on any machine.
DECLARED = Execution()


@dataclass(frozen=True)
class Chunk:
    """Tokens that a program is given at once.

    Attributes:
        position: Of the first; at most that of the chunk before and its tokens, see `rewind`.
        tokens: What the method may have to pad.
    """

    position: int
    tokens: Sequence[int]


@dataclass(frozen=True, eq=False)
class Sequenced:
    """A text to be read in chunks.

    Attributes:
        chunks: The calls.
        states: What is remembered before, see `Runner.resume`; None is nothing but zeros.
    """

    chunks: Sequence[Chunk]
    states: Mapping[str, torch.Tensor] | None = None

    def calls(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield the arguments of every call: tokens int64 `[1, S]`, position int64 `[1]`."""
        for chunk in self.chunks:
            yield torch.tensor([list(chunk.tokens)]), torch.tensor([chunk.position])

    def read_by(self, runner: Runner) -> list[torch.Tensor]:
        """Return what each of the chunks gives on a runner, read one after the other."""
        start = self.chunks[0].position
        runner.reset(start)
        if self.states is not None:
            runner.resume(start, self.states)
        given = []
        for chunk in self.chunks:
            runner.rewind(chunk.position)
            given.append(runner.step(chunk.tokens))
        return given


@final
class ReferenceRunner(Runner):
    """The Core ML programs inside a `.pte`, executed by the reference runtime.

    Args:
        path: The `.pte`.
        execution: Numerics, device and memory.
        description: What the file offers; None finds it out, where the method `forward` is one
            Core ML program.

    Attributes:
        description: What the file offers.
        methods: The methods that read tokens, by name.
        programs: The Core ML programs of all methods.

    Raises:
        ArtifactError: the file is damaged, contradicts its description, several of its methods have
            states, or one has another signature than an LLM's.
        ConfigError: the execution asks for what is not there.
    """

    def __init__(
        self,
        path: Path,
        execution: Execution = DECLARED,
        description: Description | None = None,
    ) -> None:
        super().__init__()
        if description is not None:
            description.check_one_sequence()
        names = (MAIN_METHOD,) if description is None else tuple(description.methods)
        self.methods = load_methods(path, execution, names)
        self.label = "reference runtime" + execution_suffix(execution)
        for method in self.methods.values():
            check_signature(method, path)
        if description is None:
            description = _describe(self.methods[MAIN_METHOD], path)
        else:
            _check_description(description, self.methods, path)
        self.description = description
        self.programs = tuple(item for method in self.methods.values() for item in method.programs)
        self.seq_lengths = description.seq_lengths
        self.ranged = description.ranged
        self.every_row = description.every_row
        self.context = description.context
        self.rewinds = description.rewinds
        self.head = description.head
        main = self.methods[description.main]
        width = main.outputs[0].shape[2]
        chosen = self.head.count is not None
        self.vocab_size = _constant(main.constants, "get_vocab_size", path) if chosen else width
        self._caches: dict[str, torch.Tensor] = {}
        self._clear()

    @property
    def program(self) -> CoreMLProgram | Series:
        """The Core ML program, or the partitions in a row, for observers.

        Raises:
            ArtifactError: there are several programs that do not run one after the other.
        """
        if len(self.programs) == 1:
            return self.programs[0]
        in_a_row = self.methods[self.description.main].in_a_row
        if len(self.methods) > 1 or not in_a_row:
            raise ArtifactError(
                f"The file holds {len(self.programs)} Core ML programs; only a single one can be "
                "watched, or the partitions of a single method."
            )
        return Series(in_a_row)

    def constants(self) -> Iterator[tuple[str, torch.Tensor | PackedWeight]]:
        """Yield the constants of all programs and kernels, see `CoreMLProgram.constants`."""
        of_programs = (program.constants() for program in self.programs)
        of_kernels = (method.weights() for method in self.methods.values())
        return itertools.chain.from_iterable((*of_programs, *of_kernels))

    def page_out(self) -> None:
        """Take the file's pages out of memory; what is needed of them is read again."""
        for method in self.methods.values():
            method.page_out()

    def read(
        self, sequences: Sequence[Sequenced], on_rows: OnRows = lambda weight, rows: None
    ) -> list[list[torch.Tensor]]:
        """Read several texts in chunks, expanding every weight once for all where that is possible.

        Args:
            sequences: The texts.
            on_rows: Told of the rows of packed weights that are expanded for products.

        Returns:
            For each text what `step` gives for its chunks. Nothing is remembered.

        Raises:
            ArtifactError: the program contradicts itself.
        """
        main = self.methods[self.description.main]
        if len(self.methods) > 1 or not main.in_a_row or self._caches:
            return [text.read_by(self) for text in sequences]
        calls = [list(text.calls()) for text in sequences]
        # Of every call of every text, what the programs so far have given.
        given: list[list[list[Outputs]]] = [[[] for _ in text] for text in calls]
        states = [own_states(main, text.states or {}) for text in sequences]
        for program in main.in_a_row:
            inputs = [
                [main.inputs_of(before, *call) for before, call in zip(*text, strict=True)]
                for text in zip(given, calls, strict=True)
            ]
            own = [of_program(program, each) for each in states]
            outputs = program.side_by_side(list(zip(own, inputs, strict=True)), on_rows)
            for befores, results in zip(given, outputs, strict=True):
                for before, found in zip(befores, results, strict=True):
                    before.append(found)
        return [
            [
                self._rows(main.run_with(found, *call))[0].to(torch.float32)
                for found, call in zip(*text, strict=True)
            ]
            for text in zip(given, calls, strict=True)
        ]

    def _forward(self, tokens: torch.Tensor, start_pos: torch.Tensor) -> torch.Tensor:
        method = self.methods[self.description.method_for(tokens.shape[1])]
        given = method.run(tokens, start_pos, *self._caches.values())
        caches = given[len(self.head.gives) :]
        self._caches = dict(zip(self._caches, caches, strict=True))
        return self._rows(given)

    def _rows(self, given: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the logits that a call gave, `[1, rows, vocab]`."""
        if self.head.count is None:
            return given[0].cpu()
        return spread(given[0].cpu(), given[1].cpu(), self.vocab_size)

    def _clear(self) -> None:
        for method in self.methods.values():
            method.reset()
        # As the method declares them, which may be wider where nothing is rounded.
        specs = self.methods[self.description.main].inputs[len(INPUTS) :]
        self._caches = {
            name: torch.zeros(spec.shape, dtype=dtype_of(spec))
            for name, spec in zip(self.description.caches, specs, strict=True)
        }

    def _restore(self, states: Mapping[str, torch.Tensor]) -> None:
        self._clear()
        if self._caches:
            rows = {name: len(cache) for name, cache in self._caches.items()}
            self._caches = carried(self._caches, divided(states, rows))
            return
        for method in self.methods.values():
            own = own_states(method, states)
            for program in method.programs:
                if program.states:
                    program.remember(of_program(program, own))


def _describe(method: LoadedMethod, path: Path) -> Description:
    """Return what a method that is one Core ML program offers."""
    if len(method.programs) != 1:
        raise ArtifactError(
            f"Method '{method.name}' of '{path}' is {len(method.programs)} Core ML programs, of "
            "which nothing tells the lengths; give the bundle that it belongs to."
        )
    (program,) = method.programs
    lengths = _lengths(method, path)
    _, rows, width = method.outputs[0].shape
    output = f"{method.outputs[0].dtype} [1, {'S' if rows != 1 else 1}, {width}]"
    form = MethodForm((*INPUTS, *_caches(method)), output, lengths, (program.function_name,))
    static = "enumerated" if len(lengths) > 1 else "static"
    return Description(
        form=RANGE if _ranged(method) else static,
        backend="coreml",
        methods={method.name: form},
        every_row=rows != 1,
        states=_states(method),
        context=_constant(method.constants, "get_max_context_len", path),
        constant_methods=method.constants,
        head=head_of(method),
    )


def _check_description(
    description: Description, methods: Mapping[str, LoadedMethod], path: Path
) -> None:
    """Hold a description against what the file tells of itself."""
    for name, method in methods.items():
        form = description.methods[name]
        # Of several partitions in a row, nothing tells which takes the tokens.
        single = form.partitions == len(method.programs) == 1
        # A call with one token has one row either way.
        every_row = description.every_row and form.seq_lengths != (1,)
        compared: dict[str, tuple[object, object]] = {
            "functions": (form.functions, tuple(item.function_name for item in method.programs)),
            "lengths": (form.seq_lengths, _lengths(method, path) if single else form.seq_lengths),
            "a range": (description.ranged, _ranged(method) if single else description.ranged),
            "head": (str(as_given(description.head)), str(as_given(head_of(method)))),
            "row for each token": (every_row, method.outputs[0].shape[1] != 1),
            "context": (
                description.context,
                _constant(method.constants, "get_max_context_len", path),
            ),
            "states": (dict(description.states), _states(method)),
            "caches": (
                list(form.caches.values()),
                [text.partition(" ")[2] for text in _caches(method)],
            ),
        }
        for what, (told, found) in compared.items():
            if told != found:
                raise ArtifactError(
                    f"Method '{name}' of '{path}' is not what the manifest describes ({what}: "
                    f"{found}, not {told}). Export again."
                )
    description.check_constants(methods[description.main].constants, path)


def _caches(method: LoadedMethod) -> list[str]:
    """Return name, element type and shape of the caches that a method takes, in order."""
    names = [
        feature.name.removeprefix(PAST)
        for program in method.programs
        for feature in program.inputs
        if feature.name.startswith(PAST)
    ]
    specs = method.declared[len(INPUTS) :]
    names = names if len(names) == len(specs) else [f"cache_{at}" for at in range(len(specs))]
    return [
        f"{name} {spec.dtype} {list(spec.shape)}" for name, spec in zip(names, specs, strict=True)
    ]


def _states(method: LoadedMethod) -> dict[str, str]:
    """Return element type and shape of what a method's programs remember, by name."""
    return {
        feature.name: (
            f"{str(INTERFACE_TYPES[feature.dtype]).removeprefix('torch.')} {list(feature.shape)}"
        )
        for program in method.programs
        for feature in program.states
    }


def _lengths(method: LoadedMethod, path: Path) -> tuple[int, ...]:
    """Return the lengths that the only program of a method accepts, ascending."""
    (program,) = method.programs
    tokens = [
        feature
        for feature in program.inputs
        if (len(feature.shape) == 2 and not feature.name.startswith((PAST, WEIGHTS)))
        or feature.name == HIDDEN  # a row of the token table for each token
    ]
    if len(tokens) != 1:
        raise ArtifactError(
            f"Method '{method.name}' of '{path}' has {len(tokens)} inputs of two axes; a language "
            "model takes tokens [1, S]."
        )
    if tokens[0].ranges and not tokens[0].enumerated:
        first, last = tokens[0].ranges[1]
        return first, first if last is None else last
    shapes = tokens[0].enumerated or (tokens[0].shape,)
    return tuple(sorted(shape[1] for shape in shapes))


def _ranged(method: LoadedMethod) -> bool:
    """Return whether a method's only program accepts every length of a range."""
    (program,) = method.programs
    return any(feature.ranges and not feature.enumerated for feature in program.inputs)


def execution_suffix(execution: Execution) -> str:
    """Return what is not usual about an execution, such as ` (fp32, cuda)`."""
    mode = "" if execution.mode == DECLARED.mode else execution.mode
    device = "" if execution.device == DECLARED.device else execution.device
    told = [word for word in (mode, device, "compiled" if execution.compiled else "") if word]
    return f" ({', '.join(told)})" if told else ""


def _constant(constants: Mapping[str, object], name: str, path: Path) -> int:
    value = constants.get(name)
    if not isinstance(value, int):
        raise ArtifactError(f"'{path}' has no constant method {name}; it is no export of an LLM.")
    return value
