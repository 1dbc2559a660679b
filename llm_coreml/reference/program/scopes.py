"""Names of nested blocks, made unique in their function.

The two blocks of a loop may call what they carry by the same names; elsewhere a name that is
defined twice is an error. Each block's own names therefore get the block as a prefix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from llm_coreml.artifact.mil import Binding, Block, NamedType, Operation


def unique_names(operations: Sequence[Operation]) -> tuple[Operation, ...]:
    """Return `operations` with the values inside of nested blocks under names of their own."""
    return tuple(_operation(operation, {}, "") for operation in operations)


def _operation(operation: Operation, names: Mapping[str, str], prefix: str) -> Operation:
    """Return `operation` with what it uses, in blocks too, renamed by `names`."""
    if not names and not operation.blocks:
        return operation
    inputs = {
        key: tuple(_renamed(binding, names) for binding in bound)
        for key, bound in operation.inputs.items()
    }
    blocks = tuple(
        _block(block, names, f"{prefix}{operation.name}/{number}/")
        for number, block in enumerate(operation.blocks)
    )
    return replace(operation, inputs=inputs, blocks=blocks)


def _block(block: Block, outer: Mapping[str, str], prefix: str) -> Block:
    names = {**outer, **{item.name: prefix + item.name for item in block.inputs}}
    operations = []
    for operation in block.operations:
        # Later operations see what this one defines; it does not see itself.
        inner = _operation(operation, names, prefix)
        names.update({item.name: prefix + item.name for item in operation.outputs})
        operations.append(replace(inner, outputs=_typed(operation.outputs, names)))
    return Block(
        _typed(block.inputs, names),
        tuple(names.get(name, name) for name in block.outputs),
        tuple(operations),
    )


def _typed(items: Sequence[NamedType], names: Mapping[str, str]) -> tuple[NamedType, ...]:
    return tuple(replace(item, name=names[item.name]) for item in items)


def _renamed(binding: Binding, names: Mapping[str, str]) -> Binding:
    return names.get(binding, binding) if isinstance(binding, str) else binding
