"""Run a whole method of a `.pte`: its kernels and its Core ML delegates, in the plan's own order.

    forward = LoadedMethod(method, Packages(container), Execution().pool(), constants)
    logits = forward(torch.tensor([[1, 2, 3]]), torch.tensor([0]))
    forward.reset()

Nothing is assumed about the plan. Each instruction is executed as it stands; one that is unknown is
an error that names it, when the method is loaded.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch

from llm_coreml.artifact.mapped import page_out
from llm_coreml.artifact.method_plan import Constant, Instruction, Method, TensorSpec
from llm_coreml.artifact.packages import Lowered, Packages
from llm_coreml.errors import ArtifactError
from llm_coreml.reference.method.kernels import COPIES, convert, kernel, present
from llm_coreml.reference.method.memory import MethodMemory, Values, dtype_of
from llm_coreml.reference.program.constants import ConstantPool
from llm_coreml.reference.program.coreml_program import CoreMLProgram

# A step returns the number of the next one if it is not the one that follows.
Step = Callable[[Values], int | None]
# Gives the outputs of a program for its inputs.
Answer = Callable[[CoreMLProgram, Mapping[str, torch.Tensor]], Mapping[str, torch.Tensor]]


class _HaltedError(Exception):
    """The program has been reached."""


class LoadedMethod:
    """A method of a `.pte`, ready to run.

    Attributes:
        name: the method's name.
        inputs: dtype and shape of each argument; fp32 for fp16 where nothing is rounded.
        declared: the same as the file has them.
        outputs: dtype and shape of each result.
        programs: the Core ML programs, by delegate.
        constants: what the file's constant methods give, such as `get_max_seq_len`.
    """

    def __init__(
        self,
        method: Method,
        packages: Packages,
        pool: ConstantPool,
        constants: dict[str, Constant],
        *,
        compiled: bool = False,
    ) -> None:
        self.declared = tuple(_tensor_spec(method, number) for number in method.inputs)
        method = method if pool.numerics.halves else _unrounded(method)
        self.name = method.name
        self.constants = constants
        self.inputs = tuple(_tensor_spec(method, number) for number in method.inputs)
        self.outputs = tuple(_tensor_spec(method, number) for number in method.outputs)
        self.programs: list[CoreMLProgram] = []
        self._method = method
        self._memory = MethodMemory(method)
        self._lowered = [packages.open(delegate) for delegate in method.delegates]
        self.programs = [
            CoreMLProgram(item.package.model, item.function, pool, compiled=compiled)
            for item in self._lowered
        ]
        self._answer: Answer = lambda program, given: program(given)
        # Of every program, what is the same in each call.
        self._fixed: dict[CoreMLProgram, dict[str, torch.Tensor]] = {}
        self._steps = [
            self._step(number, instruction)
            for number, instruction in enumerate(method.instructions)
        ]

    def reset(self) -> None:
        """Set the states of all programs to zero, and the plan's own buffers to what they were."""
        self._memory.reset()
        for program in self.programs:
            program.reset()

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the floating-point constants that kernels and programs are given.

        A matrix of a product is turned, so that it has the rows of outputs that weights have;
        codes whose rows are looked up beside those of scales are multiplied with them.
        """
        steps, held = self._method.instructions, self._memory.values()
        turned = {step.args[1] for step in steps if step.target == "aten::mm.out"}
        looked_up = [step.args for step in steps if step.target == "aten::embedding.out"]
        places = {table: tokens for table, tokens, *_ in looked_up}
        codes = {
            places[table]: held[table]
            for table in places
            if isinstance(held[table], torch.Tensor) and held[table].dtype == torch.int8
        }
        for number, value in enumerate(self._method.values):
            if not isinstance(value, TensorSpec) or not value.constant:
                continue
            found = held[number]
            if isinstance(found, torch.Tensor) and found.is_floating_point():
                who = f"constant {number} of method '{self.name}'"
                scaled = codes.get(places.get(number, -1))
                if scaled is not None and scaled.shape[:-1] == found.shape[:-1]:
                    found = scaled.to(torch.float32) * found.to(torch.float32)
                yield who, found.t() if number in turned else found

    def page_out(self) -> None:
        """Take the file's pages out of memory, which weights that stay packed are read from."""
        for delegate in self._method.delegates:
            page_out(delegate.data)

    def __call__(self, *arguments: torch.Tensor) -> torch.Tensor:
        """Run the method and return its only output.

        Args:
            *arguments: as `inputs` says; for a language model `tokens` int64 [1, S] and
                `start_pos` int64 [1].

        Returns:
            The method's output, for a language model float32 [1, 1, V] or [1, S, V].

        Raises:
            ArtifactError: the method has several outputs, or as `run` says.
        """
        results = self.run(*arguments)
        if len(results) != 1:
            raise ArtifactError(f"Method '{self.name}' gives {len(results)} outputs; use run().")
        return results[0]

    def run(self, *arguments: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Run the method and return all its outputs, which the caller owns.

        Raises:
            ArtifactError: an argument does not fit, or the program contradicts itself.
        """
        if len(arguments) != len(self.inputs):
            raise ArtifactError(
                f"Method '{self.name}' takes {len(self.inputs)} arguments, not {len(arguments)}."
            )
        values = self._memory.values()
        with torch.inference_mode():
            for number, value in zip(self._method.inputs, arguments, strict=True):
                # A copy, since a kernel may write to it.
                who = f"Argument {number} of method '{self.name}'"
                self._memory.store(values, number, value.clone(), who)
            at = 0
            while at < len(self._steps):
                target = self._steps[at](values)
                at = at + 1 if target is None else target
        return tuple(self._present(values, number).clone() for number in self._method.outputs)

    @property
    def in_a_row(self) -> tuple[CoreMLProgram, ...]:
        """The programs in the order in which they run, each once in every call; else none."""
        steps = self._method.instructions
        order = [int(step.target) for step in steps if step.kind == "delegate"]
        if sorted(order) != list(range(len(self.programs))):
            return ()
        branches = any(step.kind == "jump_false" for step in steps)
        return () if branches else tuple(self.programs[index] for index in order)

    def inputs_of(
        self, given: Sequence[Mapping[str, torch.Tensor]], *arguments: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Return what the next program in a row is given in a call, without running it.

        Args:
            given: What those before it give.
            *arguments: Of the call.

        Raises:
            ArtifactError: as `run` says.
        """
        found: dict[str, torch.Tensor] = {}
        answers = iter(given)

        def answer(
            program: CoreMLProgram, inputs: Mapping[str, torch.Tensor]
        ) -> Mapping[str, torch.Tensor]:
            outputs = next(answers, None)
            if outputs is not None:
                return outputs
            # The method's memory is used again by the next call, but for constants.
            fixed = self._fixed[program]
            own = {name: value.clone() for name, value in inputs.items() if name not in fixed}
            found.update(fixed | own)
            raise _HaltedError

        with self.answered(answer), contextlib.suppress(_HaltedError):
            self.run(*arguments)
        return found

    def run_with(
        self, given: Sequence[Mapping[str, torch.Tensor]], *arguments: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """Do what `run` does whose programs in a row have given `given`."""
        answers = iter(given)
        with self.answered(lambda program, inputs: next(answers)):
            return self.run(*arguments)

    @contextlib.contextmanager
    def answered(self, answer: Answer) -> Iterator[None]:
        """While the context lasts, have `answer` give what the programs would."""
        usual, self._answer = self._answer, answer
        try:
            yield
        finally:
            self._answer = usual

    def _present(self, values: Values, number: int) -> torch.Tensor:
        try:
            return present(values, number)
        except ArtifactError as error:
            raise ArtifactError(f"In method '{self.name}', {error}") from error

    def _step(self, number: int, instruction: Instruction) -> Step:
        if instruction.kind == "kernel":
            return kernel(instruction.target, instruction.args, self._method, self._memory)
        if instruction.kind == "delegate":
            return self._delegate(int(instruction.target), instruction.args)
        if instruction.kind == "jump_false":
            return self._jump(number, int(instruction.target), instruction.args[0])
        return _move(*instruction.args) if instruction.kind == "move" else _free(*instruction.args)

    def _jump(self, number: int, target: int, condition: int) -> Step:
        # Only forward, so that every run ends.
        if not number < target <= len(self._method.instructions):
            raise ArtifactError(
                f"Instruction {number} of method '{self.name}' jumps to {target}; the reference "
                "runs branches, but no loops."
            )

        def step(values: Values) -> int | None:
            value = values[condition]
            if isinstance(value, torch.Tensor):
                value = bool(value.all())
            if not isinstance(value, bool):
                raise ArtifactError(f"Method '{self.name}' branches on {value!r}, no truth value.")
            return None if value else target

        return step

    def _delegate(self, index: int, args: tuple[int, ...]) -> Step:
        program, lowered = self.programs[index], self._lowered[index]
        self._check_names(program, lowered, len(args))
        sources = dict(zip(lowered.inputs, args, strict=False))
        results = dict(zip(lowered.outputs, args[len(lowered.inputs) :], strict=True))
        expected = {name: _tensor_spec(self._method, number) for name, number in results.items()}

        wanted = {feature.name: program.taken(feature) for feature in program.inputs}
        held = self._memory.values()
        fixed = {
            name: _taken(name, self._present(held, number), wanted[name])
            for name, number in sources.items()
            if _tensor_spec(self._method, number).constant
        }
        self._fixed[program] = fixed

        def step(values: Values) -> None:
            given = dict(fixed)
            for name, number in sources.items():
                if name not in fixed:
                    given[name] = _taken(name, self._present(values, number), wanted[name])
            outputs = self._answer(program, given)
            for name, number in results.items():
                who, spec = f"The output '{name}'", expected[name]
                value = _exact(outputs[name], dtype_of(spec), who)
                single = not spec.shape and tuple(value.shape) == (1,)
                self._memory.store(values, number, value.reshape(()) if single else value, who)

        return step

    def _check_names(self, program: CoreMLProgram, lowered: Lowered, count: int) -> None:
        inputs, outputs = lowered.inputs, lowered.outputs
        if count != len(inputs) + len(outputs):
            raise ArtifactError(
                f"Method '{self.name}' passes {count} values to a delegate; its metadata names "
                f"{len(inputs)} inputs and {len(outputs)} outputs."
            )
        twice = {name for names in (inputs, outputs) for name in names if names.count(name) > 1}
        if twice:
            raise ArtifactError(
                f"The metadata of a delegate of method '{self.name}' names {sorted(twice)} more "
                "than once, where ExecuTorch looks values up by name; return each result once."
            )
        known = {feature.name for feature in program.outputs}
        wanted = sorted(feature.name for feature in program.inputs)
        if sorted(inputs) != wanted or not set(outputs) <= known:
            raise ArtifactError(
                f"The metadata of a delegate of method '{self.name}' names inputs or outputs that "
                "its program does not have."
            )


def _unrounded(method: Method) -> Method:
    """Return the method with fp32 for the fp16 of its arguments and results.

    Where nothing is rounded, what goes from call to call is not either, and neither is what goes
    from program to program alone, with kernels that copy it between.
    """
    kernels = {
        place
        for step in method.instructions
        if step.kind in ("kernel", "move") and step.target not in COPIES
        for place in step.args
    }
    delegates = (step for step in method.instructions if step.kind == "delegate")
    programs = {place for step in delegates for place in step.args}
    borders = {*method.inputs, *method.outputs, *(programs - kernels)}
    values = tuple(
        replace(value, dtype="float32", place=None, nbytes=2 * (value.nbytes or 0))
        if number in borders
        and isinstance(value, TensorSpec)
        and value.dtype == "float16"
        and not value.constant
        else value
        for number, value in enumerate(method.values)
    )
    return replace(method, values=values)


def _move(source: int, destination: int) -> Step:
    def step(values: Values) -> None:
        values[destination] = values[source]

    return step


def _free(number: int) -> Step:
    def step(values: Values) -> None:
        values[number] = None

    return step


def _tensor_spec(method: Method, number: int) -> TensorSpec:
    value = method.values[number]
    if not isinstance(value, TensorSpec):
        raise ArtifactError(
            f"Method '{method.name}' passes a {type(value).__name__}, not a tensor."
        )
    return value


def _taken(name: str, value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return what a program is given: ExecuTorch's delegate converts as it copies values in.

    A tensor without dimensions gets one.
    """
    found = _exact(value, dtype, f"The input '{name}'")
    return found if found.ndim else found.reshape(1)


def _exact(value: torch.Tensor, dtype: torch.dtype, who: str) -> torch.Tensor:
    """Return `value` as `dtype`, which must be able to hold it."""
    # Core ML has no bool at its borders and gives zeros and ones.
    truth = dtype == torch.bool and bool(((value == 0) | (value == 1)).all())
    if value.is_floating_point() and not dtype.is_floating_point and not truth:
        raise ArtifactError(f"{who} is {value.dtype}; as {dtype} it would lose its fractions.")
    try:
        return convert(value, dtype)
    except ArtifactError as error:
        raise ArtifactError(f"{who} is {value.dtype}: {error}") from error
