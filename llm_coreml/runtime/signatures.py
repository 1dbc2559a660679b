"""What a method of a `.pte` takes and gives, as far as it is a language model's."""

from __future__ import annotations

from pathlib import Path

from llm_coreml.errors import ArtifactError
from llm_coreml.heads import LOGITS, Head
from llm_coreml.reference.method.method import LoadedMethod


def head_of(method: LoadedMethod) -> Head:
    """Return what a method gives of a row: behind float values may be their tokens, int32."""
    told = [(spec.dtype, tuple(spec.shape)) for spec in method.outputs[:2]]
    if len(told) == 2 and told[1][0] == "int32" and told[1][1] == told[0][1]:
        count = told[0][1][2]
        return Head("argmax" if count == 1 else "topk", count)
    return LOGITS


def as_given(head: Head) -> Head:
    """Return a head as a file shows it, in which the largest one is the first of one."""
    return Head("argmax", 1) if head.count == 1 else head


def check_signature(method: LoadedMethod, path: Path) -> None:
    """Refuse a method that does not take tokens and a position, and give logits.

    Behind those it may take and give caches; behind logits that it chose come their tokens.
    """
    signature = [(spec.dtype, len(spec.shape)) for spec in method.inputs]
    if signature[:2] != [("int64", 2), ("int64", 1)]:
        raise ArtifactError(
            f"Method '{method.name}' of '{path}' takes {signature}; a language model takes tokens "
            "int64 [1, S] and start_pos int64 [1]."
        )
    given = [len(spec.shape) for spec in method.outputs]
    if given[:1] != [3]:
        raise ArtifactError(
            f"Method '{method.name}' of '{path}' gives outputs of {given} axes; a language model "
            "gives logits [1, S, V] for tokens [1, S]."
        )
    taken, returned = (
        [(spec.dtype, spec.shape) for spec in specs]
        for specs in (method.inputs[2:], method.outputs[len(head_of(method).gives) :])
    )
    if taken != returned:
        raise ArtifactError(
            f"Method '{method.name}' of '{path}' takes caches {taken} and gives {returned}; what "
            "it gives belongs into its next call."
        )
