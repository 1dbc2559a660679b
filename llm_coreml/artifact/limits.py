"""What a file may ask of this machine: sizes are read from files that nobody vouches for.

if excess := beyond(4 * elements):
    raise ArtifactError(f"The state 'cache' {excess}.")
"""

from __future__ import annotations

from llm_coreml.machine import machine_memory

# Manifests and metadata are a page or two.
MAX_JSON = 1 << 20
# A program without its weights; the largest in use are a tenth of this.
MAX_PROGRAM = 1 << 27
MAX_OPERATIONS = 1 << 20
# Core ML's own limit is 5; compressed weights have two axes more.
MAX_RANK = 16


def beyond(nbytes: int) -> str:
    """Return "" if this machine can hold `nbytes`, else a predicate that says how it cannot."""
    if nbytes <= machine_memory():
        return ""
    return f"takes {_gib(nbytes)} of memory, of which this machine has {_gib(machine_memory())}"


def _gib(nbytes: int) -> str:
    return f"{nbytes >> 30} GiB" if nbytes < 1 << 60 else "more than 1000000000 GiB"


# What an operation raises whose operands a damaged program chose.
FAILURES = (
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RuntimeError,
    TypeError,
    ValueError,
)


def reason(error: BaseException) -> str:
    """Return the first line of what `error` says, or its kind if it says nothing."""
    return str(error).partition("\n")[0] or type(error).__name__
