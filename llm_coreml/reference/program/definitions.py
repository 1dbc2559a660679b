"""What a function defines: names, declared types, constants, and the operations left to run.

Nothing is decoded or executed here. Each name is defined once, a computed value before it is used;
each operation is known, and a compressed constant depends on constants alone.

    found = definitions(function, OPS)
    found.constants["weight"]      # a Constant, or an Expression of constants
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from llm_coreml.artifact.mil import Function, NamedType, Operation, StateType, TensorType
from llm_coreml.errors import ArtifactError, nearest
from llm_coreml.reference.ops import Spec
from llm_coreml.reference.program.arguments import arguments, label, result_types
from llm_coreml.reference.program.constants import Expression, Source
from llm_coreml.reference.program.control import CONTROL
from llm_coreml.reference.program.scopes import unique_names

STATE_OPS = ("read_state", "write_state")


@dataclass(frozen=True, eq=False)
class Definitions:
    """What `definitions` finds.

    Attributes:
        function: the function with the operations that a call runs; constants are left out.
        types: declared type of every value and every tensor constant.
        constants: what the constants are.
        states: names of the states.
    """

    function: Function
    types: Mapping[str, TensorType]
    constants: Mapping[str, Source]
    states: frozenset[str]


def definitions(function: Function, ops: Mapping[str, Spec]) -> Definitions:
    """Collect what `function` defines.

    Args:
        function: as the file has it.
        ops: the known operations.

    Raises:
        ArtifactError: a name is defined twice or not at all, or an operation is unknown or is
            called wrongly.
    """
    found = _Collector(function, ops)
    runnable = replace(function, operations=found.define(unique_names(function.operations)))
    _check_order(runnable, found.constants)
    return Definitions(runnable, found.types, found.constants, frozenset(found.states))


def nested(operations: Sequence[Operation]) -> Iterator[Operation]:
    """Yield `operations` and those inside of their blocks."""
    for operation in operations:
        yield operation
        for block in operation.blocks:
            yield from nested(block.operations)


class _Collector:
    def __init__(self, function: Function, ops: Mapping[str, Spec]) -> None:
        self.ops = ops
        self.types: dict[str, TensorType] = {}
        self.constants: dict[str, Source] = {}
        self.states: set[str] = set()
        for item in function.inputs:
            self._declare(item)
            if isinstance(item.type, StateType):
                self.states.add(item.name)

    def define(self, operations: Sequence[Operation]) -> tuple[Operation, ...]:
        """Note what the operations define; return those that a call must run."""
        runnable = []
        for operation in operations:
            if operation.type == "const":
                self._constant(operation)
            elif operation.type.startswith("constexpr_"):
                self._expression(operation)
            else:
                self._known(operation)
                blocks = []
                for block in operation.blocks:
                    for item in block.inputs:
                        self._declare(item)
                    blocks.append(replace(block, operations=self.define(block.operations)))
                for item in operation.outputs:
                    self._declare(item)
                runnable.append(replace(operation, blocks=tuple(blocks)))
        return tuple(runnable)

    def _declare(self, item: NamedType) -> None:
        if item.name in self.types or item.name in self.constants:
            raise ArtifactError(f"The program defines '{item.name}' twice.")
        wrapped = item.type.wrapped if isinstance(item.type, StateType) else item.type
        if not isinstance(wrapped, TensorType):
            raise ArtifactError(
                f"'{item.name}' has the type {item.type}; only tensors can be computed."
            )
        self.types[item.name] = wrapped

    def _known(self, operation: Operation) -> None:
        who = label(operation)
        if operation.type in CONTROL:
            if len(operation.blocks) != 2:
                raise ArtifactError(f"{who} has {len(operation.blocks)} nested blocks, not 2.")
        elif operation.blocks:
            raise ArtifactError(f"{who} has nested blocks, which this operation does not take.")
        elif operation.type not in self.ops and operation.type not in STATE_OPS:
            raise ArtifactError(
                f"{who} is not known to the reference runtime."
                f"{nearest(operation.type, self.ops)} Add it in llm_coreml/reference/ops."
            )
        elif operation.type in self.ops and not operation.outputs:
            raise ArtifactError(f"{who} has no results.")
        elif operation.type in STATE_OPS:
            bound = operation.inputs.get("input", ())
            if len(bound) != 1 or bound[0] not in self.states:
                raise ArtifactError(f"{who} does not name a state.")
            if len(operation.outputs) != (operation.type == "read_state"):
                raise ArtifactError(f"{who} has {len(operation.outputs)} results.")

    def _constant(self, operation: Operation) -> None:
        value = operation.attributes.get("val")
        if value is None or len(operation.outputs) != 1:
            raise ArtifactError(f"{label(operation)} has no value.")
        item = operation.outputs[0]
        if item.type != value.type:
            raise ArtifactError(f"{label(operation)} declares {item.type} and holds {value.type}.")
        if isinstance(item.type, TensorType):
            self._declare(item)
        elif item.name in self.constants:
            raise ArtifactError(f"The program defines '{item.name}' twice.")
        self.constants[item.name] = value

    def _expression(self, operation: Operation) -> None:
        """Note a compressed constant; its inputs are constants by definition."""
        spec = self.ops.get(operation.type)
        if spec is None:
            self._known(operation)
            raise AssertionError("an unknown operation was accepted")
        given = arguments(operation, spec, self.constants, self.types)
        result_types(operation, spec, given)
        operands = {}
        for key, bound in given.tensors.items():
            source = self.constants.get(bound[0]) if isinstance(bound[0], str) else bound[0]
            if source is None:
                raise ArtifactError(
                    f"{label(operation)} uses '{bound[0]}', which is not a constant."
                )
            operands[key] = source
        for number, item in enumerate(operation.outputs):
            self._declare(item)
            declared = self.types[item.name]
            self.constants[item.name] = Expression(
                label(operation), spec, operands, given.plain, declared, number
            )


def _check_order(function: Function, constants: Mapping[str, Source]) -> None:
    def check(operations: Sequence[Operation], known: set[str]) -> None:
        for operation in operations:
            for bound in operation.inputs.values():
                for name in bound:
                    if isinstance(name, str) and name not in known:
                        raise ArtifactError(
                            f"{label(operation)} uses '{name}', which nothing defines before."
                        )
            for block in operation.blocks:
                inner = known | {item.name for item in block.inputs}
                check(block.operations, inner)
                for name in set(block.outputs) - inner:
                    raise ArtifactError(
                        f"A block of {label(operation)} gives '{name}', which it does not have."
                    )
            known.update(item.name for item in operation.outputs)

    check(function.operations, {item.name for item in function.inputs} | constants.keys())
