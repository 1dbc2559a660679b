"""Which `slice_update` may write into a state directly, instead of into a copy of it.

A key-value cache is large, and every layer updates it for every token. Writing in place is right
only if nobody can see the difference: the updated value is what the state becomes next, and no
value that shares the state's memory is looked at afterwards. This module decides that before the
first call, from the operations alone, and keeps the copy wherever it is not sure.

    updates = choose_updates(function, owned)
    updates.in_place    # numbers of the slice_update operations that write directly
    updates.settled     # numbers of the write_state operations that then have nothing left to do
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llm_coreml.artifact.mil import Function, Operation, StateType
from llm_coreml.reference.ops import OPS


@dataclass(frozen=True)
class StateUpdates:
    """The decision; numbers refer to the function's operations."""

    in_place: frozenset[int]
    settled: frozenset[int]


def choose_updates(function: Function, owned: frozenset[str]) -> StateUpdates:
    """Decide which updates of `function` write in place.

    Args:
        function: its operations are looked at, not executed.
        owned: names of the values that rounding copies to fresh memory.
    """
    return _Chooser(function, owned).choose()


class _Chooser:
    def __init__(self, function: Function, owned: frozenset[str]) -> None:
        self.operations = function.operations
        self.outputs = function.outputs
        self.owned = owned
        self.memory = 0
        # What memory a value may share, and which state a value is as a whole.
        self.shares: dict[str, frozenset[int]] = {}
        self.whole: dict[str, tuple[str, int]] = {}
        self.current: dict[str, int] = {}
        for item in function.inputs:
            token = self._new()
            self.shares[item.name] = frozenset((token,))
            if isinstance(item.type, StateType):
                self.current[item.name] = token
        self.last_use = self._last_uses()

    def _new(self) -> int:
        self.memory += 1
        return self.memory

    def _last_uses(self) -> dict[str, int]:
        last: dict[str, int] = {}
        for number, operation in enumerate(self.operations):
            for name in operation.names():
                last[name] = number
        for name in self.outputs:
            last[name] = len(self.operations)
        return last

    def choose(self) -> StateUpdates:
        in_place: set[int] = set()
        settled: set[int] = set()
        for number, operation in enumerate(self.operations):
            if operation.type == "read_state":
                self._read(operation)
            elif operation.type == "write_state":
                if self._write(operation):
                    settled.add(number)
            elif self._may_write(number, operation):
                in_place.add(number)
                source, result = _single(operation, "x"), operation.outputs[0].name
                self.shares[result] = self.shares[source]
                self.whole[result] = self.whole[source]
            else:
                self._compute(operation)
        return StateUpdates(frozenset(in_place), frozenset(settled))

    def _of(self, name: str) -> frozenset[int]:
        if name not in self.shares:
            # A constant: it is the program's own memory.
            self.shares[name] = frozenset((self._new(),))
        return self.shares[name]

    def _read(self, operation: Operation) -> None:
        state, result = _single(operation, "input"), operation.outputs[0].name
        token = self.current[state]
        self.shares[result] = frozenset((token,))
        self.whole[result] = (state, token)

    def _write(self, operation: Operation) -> bool:
        state, data = _single(operation, "input"), _single(operation, "data")
        if self.whole.get(data) == (state, self.current[state]):
            return True
        self.current[state] = self._new()
        return False

    def _compute(self, operation: Operation) -> None:
        spec = OPS.get(operation.type)
        names = set(operation.names())
        shared = frozenset(token for name in names for token in self._of(name))
        if operation.blocks:
            # A block may read the state, and may bind it to other memory.
            for state in names & self.current.keys():
                old, new = self.current[state], self._new()
                self.current[state] = new
                shared |= {old, new}
                # Or it may not: then what is bound to the old memory is bound to the new.
                for name, tokens in self.shares.items():
                    if old in tokens:
                        self.shares[name] = tokens | {new}
        for item in operation.outputs:
            fresh = item.name in self.owned or (spec is not None and spec.fresh)
            self.shares[item.name] = frozenset((self._new(),)) if fresh else shared

    def _may_write(self, number: int, operation: Operation) -> bool:
        if operation.type != "slice_update":
            return False
        source, update = _single(operation, "x"), _single(operation, "update")
        if source not in self.whole:
            return False
        state, token = self.whole[source]
        if self.current[state] != token or token in self._of(update):
            return False
        seen_later = (
            name
            for name, tokens in self.shares.items()
            if token in tokens and name != state and self.last_use.get(name, -1) > number
        )
        return not any(seen_later) and self._becomes_state(number, operation, state)

    def _becomes_state(self, number: int, operation: Operation, state: str) -> bool:
        value = operation.outputs[0].name
        for later in self.operations[number + 1 :]:
            if later.blocks and state in set(later.names()):
                return False
            if later.type == "write_state" and _single(later, "input") == state:
                return _single(later, "data") == value
            if later.type == "read_state" and _single(later, "input") == state:
                return False
            if later.type == "slice_update" and _single(later, "x") == value:
                value = later.outputs[0].name
        return False


def _single(operation: Operation, parameter: str) -> str:
    bindings: Sequence[object] = operation.inputs.get(parameter, ())
    return bindings[0] if len(bindings) == 1 and isinstance(bindings[0], str) else ""
