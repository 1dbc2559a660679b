"""What a Core ML model asks of a system: what it declares, and what its functions need.

    found = compatibility(model)
    found.declared, found.needed                       # 'iOS18', 'iOS16'
    [str(need) for need in found.needs]                # ["topk ('topk_0') from iOS16 on"]
    found.mixed                                        # operations that no system takes

The declaration decides what loads: a system refuses a format or opset that is newer than itself,
whatever the operations are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from llm_coreml.artifact.mil import (
    Constant,
    Model,
    NamedType,
    Operation,
    StateType,
    TensorType,
    ValueType,
)
from llm_coreml.artifact.opsets import differing, oldest, operations
from llm_coreml.systems import BY_NAME, STATE_SYSTEM, SYSTEMS, of_specification

# What is to be done about a `Mixed`.
MIXED_ADVICE = (
    "A module that is in fp16 already meets a number of fp32 there, such as the epsilon of a norm: "
    "keep the module in fp32 and let the export make fp16 of it (--compute-precision fp16), or "
    "have all in fp32 (--compute-precision fp32)."
)
# Before, constants are of whole bytes.
_NARROW = frozenset({"int4", "uint4", "uint1", "uint2", "uint3", "uint6"})
_NARROW_SYSTEM = "iOS18"
_FUNCTIONS_SYSTEM = "iOS18"
_ENUMERATED_SYSTEM = "iOS18"
_FEATURE_SYSTEMS: Mapping[str, str] = {"fp16": "iOS16", "int8": "iOS26"}


@dataclass(frozen=True)
class Need:
    """Something that older systems do not have.

    Attributes:
        system: The oldest systems that have it; "" if none is known.
        what: An operation's type, or words.
        where: The operation's name, or that of the input or state.
        operation: Whether it is an operation.
    """

    system: str
    what: str
    where: str
    operation: bool = False

    def __str__(self) -> str:
        return f"{self.what} ('{self.where}') from {self.system or 'no known system'} on"


@dataclass(frozen=True)
class Mixed:
    """An operation whose operands are of two types, and must be of one.

    Attributes:
        operation: Its type.
        where: Its name.
        operands: The operands' names and element types, two of them.
    """

    operation: str
    where: str
    operands: tuple[tuple[str, str], tuple[str, str]]

    def __str__(self) -> str:
        (one, first), (other, second) = self.operands
        return f"{self.operation} ('{self.where}') of {one} in {first} and {other} in {second}"


@dataclass(frozen=True)
class Compatibility:
    """What a model asks of a system.

    Attributes:
        specification: Version of the model format that it declares.
        opsets: Sets of operations that its functions declare.
        declared: The oldest systems that read both; "" if it is newer than all that are known.
        needed: The oldest systems that have all that it uses; "" if no known system has.
        needs: What asks for more than the oldest system, the newest first, one of each kind.
        mixed: Operations that no Core ML compiles.
    """

    specification: int
    opsets: tuple[str, ...]
    declared: str
    needed: str
    needs: tuple[Need, ...]
    mixed: tuple[Mixed, ...]

    def newer_than(self, system: str) -> tuple[Need, ...]:
        """Return what a system lacks."""
        own = BY_NAME[system].specification
        return tuple(
            need
            for need in self.needs
            if not need.system or BY_NAME[need.system].specification > own
        )


def compatibility(model: Model) -> Compatibility:
    """Return what `model` asks of a system."""
    opsets = tuple(sorted({function.opset for function in model.functions.values()}))
    mixed: list[Mixed] = []
    kinds: dict[tuple[str, str], Need] = {}
    for need in _needs(model, mixed):
        kinds.setdefault((need.system, need.what), need)
    needs = tuple(sorted(kinds.values(), key=_newest_first))
    return Compatibility(
        model.specification_version,
        opsets,
        _declared(model.specification_version, opsets),
        needs[0].system if needs else SYSTEMS[0].name,
        needs,
        tuple(mixed),
    )


def _newest_first(need: Need) -> tuple[int, str]:
    known = BY_NAME.get(need.system)
    return (-known.specification if known else -(1 << 31), need.what)


def _declared(specification: int, opsets: Iterable[str]) -> str:
    versions = {system.opset: system.specification for system in SYSTEMS}
    known = [versions.get(opset) for opset in opsets]
    reading = of_specification(max([specification, *(each or 0 for each in known)]))
    return "" if reading is None or None in known else reading.name


def _needs(model: Model, mixed: list[Mixed]) -> Iterator[Need]:
    if len(model.functions) > 1:
        yield Need(_FUNCTIONS_SYSTEM, "several functions", ", ".join(model.functions))
    for interface in model.interfaces.values():
        enumerated = [each.name for each in interface.inputs if each.enumerated]
        if len(enumerated) > 1:
            yield Need(
                _ENUMERATED_SYSTEM, "several inputs of enumerated shapes", ", ".join(enumerated)
            )
        for state in interface.states:
            yield Need(STATE_SYSTEM, "a state", state.name)
        for feature in (*interface.inputs, *interface.outputs):
            if feature.dtype in _FEATURE_SYSTEMS:
                told = f"{feature.dtype} inputs and outputs"
                yield Need(_FEATURE_SYSTEMS[feature.dtype], told, feature.name)
    for function in model.functions.values():
        types: dict[str, ValueType] = {each.name: each.type for each in function.inputs}
        yield from _of_operations(function.operations, types, mixed)


def _of_operations(
    found: Iterable[Operation], types: dict[str, ValueType], mixed: list[Mixed]
) -> Iterator[Need]:
    for operation in found:
        yield from _of_operation(operation, types, mixed)
        for block in operation.blocks:
            _name(block.inputs, types)
            yield from _of_operations(block.operations, types, mixed)
        _name(operation.outputs, types)


def _name(values: Iterable[NamedType], types: dict[str, ValueType]) -> None:
    types.update((value.name, value.type) for value in values)


def _of_operation(
    operation: Operation, types: Mapping[str, ValueType], mixed: list[Mixed]
) -> Iterator[Need]:
    if operation.type == "const":
        for constant in operation.attributes.values():
            yield from _of_constant(constant, operation)
        return
    given = _given(operation, types)
    system = oldest(operation.type, given)
    if system is None:
        yield Need("", operation.type, operation.name, operation=True)
    elif system != SYSTEMS[0].name:
        yield Need(system, operation.type, operation.name, operation=True)
    for bindings in (*operation.inputs.values(), operation.attributes.values()):
        for value in bindings:
            if isinstance(value, Constant):
                yield from _of_constant(value, operation)
    versions = operations().get(operation.type, {})
    pairs = [differing(version, given) for version in versions.values()]
    if pairs and all(pairs):
        one, other = pairs[-1] or ("", "")
        mixed.append(
            Mixed(operation.type, operation.name, ((one, given[one]), (other, given[other])))
        )


def _of_constant(value: Constant, operation: Operation) -> Iterator[Need]:
    if isinstance(value.type, TensorType) and value.type.dtype in _NARROW:
        yield Need(_NARROW_SYSTEM, f"numbers of type {value.type.dtype}", operation.name)


def _given(operation: Operation, types: Mapping[str, ValueType]) -> dict[str, str]:
    """Return the element type of each parameter, "" for what is no tensor."""
    found = {name: _dtype(value.type) for name, value in operation.attributes.items()}
    for name, bindings in operation.inputs.items():
        kinds = [
            _dtype(each.type if isinstance(each, Constant) else types.get(each))
            for each in bindings
        ]
        found[name] = kinds[0] if len(kinds) == 1 else ""
    return found


def _dtype(kind: ValueType | None) -> str:
    if isinstance(kind, StateType):
        return ""
    return kind.dtype if isinstance(kind, TensorType) else ""
