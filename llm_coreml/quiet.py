"""Keeps the libraries below from talking, in a program that is somebody else's.

    with quiet(), no_bars():
        program = convert(...)          # no warnings, log lines and bars of coremltools and such

What they print is about their own versions and internals, and nobody who calls `export` can act on
it. All that is changed for that is put back: filters of warnings, levels of their loggers, and the
handlers that they give to the root logger. Warnings and logs of anybody else pass, the host
program's and ours. Like `warnings.catch_warnings`, it holds for all threads: the first that comes
makes the change, and the last that leaves takes it back.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import sys
import warnings
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import PurePath
from typing import Any

from llm_coreml.shared_change import SharedChange

_LIBRARIES = frozenset(
    {"accelerate", "bitsandbytes", "coremltools", "executorch", "peft", "torch", "torchao"}
    | {"httpx", "httpx2", "transformers"}
)
# Whom they call in a way that makes the warning the callee's.
_BORROWED = ("copyreg",)
# Where coremltools keeps what draws its bars.
_BARS = (
    ("coremltools.converters.mil.frontend.torch.ops", "_tqdm"),
    ("coremltools.converters.mil.mil.passes.pass_pipeline", "tqdm"),
)
_SILENT = logging.CRITICAL + 1
_LOUD = ContextVar("_LOUD", default=False)


@contextlib.contextmanager
def loud() -> Iterator[None]:
    """Have `quiet` and `no_bars` drop nothing inside the block."""
    before = _LOUD.set(True)
    try:
        yield
    finally:
        _LOUD.reset(before)


def is_loud() -> bool:
    """Say whether this runs inside of `loud`."""
    return _LOUD.get()


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    # Loaded first, since torch sets the levels of its loggers when it is.
    importlib.import_module("torch")
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        names = "|".join([*sorted(_LIBRARIES), *_BORROWED])
        warnings.filterwarnings("ignore", module=rf"({names})(\.|$)")
        stack.enter_context(_silent_loggers())
        yield


@contextlib.contextmanager
def _silent_loggers() -> Iterator[None]:
    root = logging.root
    # Those below take their level from the library's own, unless they have one.
    below = [
        logger
        for name, logger in list(root.manager.loggerDict.items())
        if isinstance(logger, logging.Logger) and logger.level and name.split(".")[0] in _LIBRARIES
    ]
    loggers = {*below, *map(logging.getLogger, _LIBRARIES)}
    levels = {logger: logger.level for logger in loggers}
    handlers = list(root.handlers)
    for logger in loggers:
        logger.setLevel(_SILENT)
    root.addFilter(_not_theirs)
    if not handlers:
        root.addHandler(_LastResort())
    try:
        yield
    finally:
        root.removeFilter(_not_theirs)
        for logger, level in levels.items():
            logger.setLevel(level)
        root.handlers[:] = handlers


class _LastResort(logging.Handler):
    """Does at the root logger what is done where there is no handler.

    With none there, `logging.warning` of a library gives it one, for the host's lines as well.
    """

    def emit(self, record: logging.LogRecord) -> None:
        asking: logging.Logger | None = logging.getLogger(record.name)
        while asking is not None and asking is not logging.root:
            if asking.handlers:
                return
            asking = asking.parent
        if logging.lastResort is not None and record.levelno >= logging.lastResort.level:
            logging.lastResort.handle(record)


def _not_theirs(record: logging.LogRecord) -> bool:
    """Say whether the root logger was asked by none of the libraries, by where their files are."""
    asking = PurePath(record.pathname)
    loaded = [sys.modules[name] for name in _LIBRARIES if name in sys.modules]
    return not any(asking.is_relative_to(folder) for each in loaded for folder in each.__path__)


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    drawn: list[tuple[Any, str, Any]] = []
    for module, name in _BARS:
        found = importlib.import_module(module)
        drawn.append((found, name, getattr(found, name)))
    for found, name, bar in drawn:
        setattr(found, name, functools.partial(bar, disable=True))
    try:
        yield
    finally:
        for found, name, bar in drawn:
            setattr(found, name, bar)


_QUIET, _NO_BARS = SharedChange(_quietly), SharedChange(_without_bars)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Drop warnings and log lines of the libraries below inside the block."""
    with contextlib.nullcontext() if is_loud() else _QUIET():
        yield


@contextlib.contextmanager
def no_bars() -> Iterator[None]:
    """Drop the progress bars of coremltools, which is loaded, inside the block."""
    with contextlib.nullcontext() if is_loud() else _NO_BARS():
        yield
