"""Whatever a tokenizer's library raises, its panics too, as one error of the caller's.

    with raised_as(lambda error: CheckpointError(f"'{path}' is no tokenizer: {error}.")):
        tokenizer = tokenizers.Tokenizer.from_file(path)

The library is native and raises bare Exceptions. Where it panics it raises what is no Exception,
of a type that is in no module which could be imported; transformers lets that pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

_PANICS = "pyo3_runtime"


@contextlib.contextmanager
def raised_as(
    make: Callable[[BaseException], Exception], but: tuple[type[Exception], ...] = ()
) -> Iterator[None]:
    """Raise what `make` makes of an exception or a panic inside the block.

    Args:
        make: Given what was raised.
        but: Exceptions that pass as they are, as do an interruption and an exit.
    """
    try:
        yield
    except but:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__module__ != _PANICS:
            raise
        raise make(error) from None
