"""A change of the whole process that holds while any of its threads is inside of it.

    quiet = SharedChange(lambda: warnings.catch_warnings())
    with quiet():
        ...

What Python keeps once for all threads, such as filters of warnings and the place of temporary
files, is changed by the first that comes, and put back by the last that leaves.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Generic, ParamSpec, final

P = ParamSpec("P")


@final
class SharedChange(Generic[P]):
    """Such a change.

    Args:
        change: Makes it, and takes it back.
    """

    def __init__(self, change: Callable[P, contextlib.AbstractContextManager[None]]) -> None:
        self._change = change
        # Making a change may ask for it again.
        self._lock = threading.RLock()
        self._inside = 0
        self._stack = contextlib.ExitStack()

    @contextlib.contextmanager
    def __call__(self, *given: P.args, **named: P.kwargs) -> Iterator[None]:
        """Hold the change inside the block; it is made as the first that comes asks for it."""
        with self._lock:
            if self._inside == 0:
                self._stack.enter_context(self._change(*given, **named))
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if self._inside == 0:
                    self._stack.close()
