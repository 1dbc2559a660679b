"""What to do about the failures of a conversion that users of Core ML meet: the cause and the flag.

    with advised(exported, "iOS17"):
        ct.convert(exported, ...)

Failures are known by the words of coremltools, each of which a test has it say. An error that is
not known passes as it is.
"""

from __future__ import annotations

import contextlib
import platform
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from torch.export import ExportedProgram

from llm_coreml.artifact.compatibility import MIXED_ADVICE, compatibility
from llm_coreml.artifact.mil import Model
from llm_coreml.errors import LlmCoreMLError, UnsupportedError
from llm_coreml.systems import BY_NAME, STATE_SYSTEM, SYSTEMS


@dataclass(frozen=True)
class _Advice:
    """A failure that is known.

    Attributes:
        words: What the library says.
        told: Returns what is said instead, of the match, the place in the model, and the system.
    """

    words: re.Pattern[str]
    told: Callable[[re.Match[str], str, str], str]


def _mixed(found: re.Match[str], where: str, _: str) -> str:
    kind, one, first, other, second = found.groups()
    return (
        f"The operation {kind}{where} takes one element type, and is given {one} in {first} and "
        f"{other} in {second}. {MIXED_ADVICE}"
    )


def _writer(_found: re.Match[str], _where: str, _system: str) -> str:
    return (
        "coremltools cannot write programs here (BlobWriter not loaded): the library that does was "
        f"not built for Python {platform.python_version()} on {platform.machine()}. Install "
        "llm-coreml with Python 3.10 to 3.13, 64 bits, on Linux or macOS."
    )


def _newer(found: re.Match[str], where: str, system: str) -> str:
    operation, _, needed = found.groups()
    return (
        f"The operation {operation}{where} begins with {needed}, and the program is for {system}; "
        f"give --minimum-os {needed}."
    )


def _state(_found: re.Match[str], _where: str, system: str) -> str:
    return (
        f"The model remembers something between calls, which Core ML does from {STATE_SYSTEM} on, "
        f"and the program is for {system}; give --minimum-os {STATE_SYSTEM}."
    )


def _later(found: re.Match[str], where: str, system: str) -> str:
    needed = next(each for each in found.groups() if each)
    return (
        f"A part of the model{where} begins with {needed}, and the program is for {system}; give "
        f"--minimum-os {needed}. coremltools says: {_first(found.string)}"
    )


def _unsupported(found: re.Match[str], where: str, _: str) -> str:
    return (
        f"coremltools has no conversion for the operation {found.group(2)}{where}, and the whole "
        "model is one Core ML program here; write the module with other operations, or have it run "
        "by XNNPACK (--backend xnnpack)."
    )


_KNOWN = (
    _Advice(
        re.compile(
            r"In op, of type (\S+), named \S+, the named input `\w+` must have the same data type "
            r"as the named input `\w+`\. "
            r"However, (\S+) has dtype (\w+) whereas (\S+) has dtype (\w+)"
        ),
        _mixed,
    ),
    _Advice(re.compile(r"BlobWriter not loaded"), _writer),
    _Advice(
        re.compile(
            r"No available version for (\w+) in the coremltools\.target\.(\w+) opset.* at least "
            r"coremltools\.target\.(\w+)"
        ),
        _newer,
    ),
    _Advice(re.compile(r"State model is supported only"), _state),
    _Advice(re.compile(r"Unsupported fx node (\S+), kind (\S+)"), _unsupported),
    _Advice(
        re.compile(
            r"at least coremltools\.target\.(iOS\d+)|supported in (iOS\d+)|(iOS\d+)\+|"
            r"minimum.deployment.target (?:is |to )?(iOS\d+)"
        ),
        _later,
    ),
)


@contextlib.contextmanager
def advised(exported: ExportedProgram, system: str) -> Iterator[None]:
    """Make a sentence of an error in the block that is known, with its cause and what mends it.

    Args:
        exported: What is converted.
        system: coremltools' name of the oldest system.

    Raises:
        UnsupportedError: a failure that is known.
    """
    try:
        yield
    except LlmCoreMLError:
        raise
    except Exception as error:
        for advice in _KNOWN:
            if found := advice.words.search(str(error)):
                where = _place(exported, error)
                raise UnsupportedError(advice.told(found, where, system)) from error
        raise


def check_systems(model: Model, exported: ExportedProgram, system: str) -> None:
    """Refuse a converted model that its oldest system would not load, or not run.

    Args:
        model: What was written.
        exported: What it was made of, for the names of its layers.
        system: coremltools' name of the oldest system.

    Raises:
        UnsupportedError: its format or opset is not the system's, or an operation is newer.
    """
    asked, meant = compatibility(model), BY_NAME[system]
    if asked.specification != meant.specification or asked.opsets != (meant.opset,):
        raise UnsupportedError(
            f"coremltools wrote version {asked.specification} of the model format, with the "
            f"operations of {' and '.join(asked.opsets)}, and {system} reads version "
            f"{meant.specification} and {meant.opset}; give --minimum-os "
            f"{asked.declared or SYSTEMS[-1].name}."
        )
    for need in asked.newer_than(system):
        where = next((told for told in _nodes(exported, need.where) if told), "")
        raise UnsupportedError(
            f"The program needs {need.what} ('{need.where}'{where}), which begins with "
            f"{need.system or 'no system that is known'}, and is for {system}; give --minimum-os "
            f"{need.system or SYSTEMS[-1].name}."
        )


def _nodes(exported: ExportedProgram, name: str) -> Iterator[str]:
    """Yield where the nodes lie whose names an operation's begins with, the longest first."""
    words = name.split("_")
    for count in range(len(words), 0, -1):
        yield place_of(exported, "_".join(words[:count]))


def place_of(exported: ExportedProgram, name: str) -> str:
    """Return the module whose node has a name, as ` in layers.3.mlp`; "" if that is not known."""
    for node in exported.graph.nodes:
        if node.name == name:
            modules = [path for path, _ in node.meta.get("nn_module_stack", {}).values()]
            return f" in {modules[-1]}" if modules and modules[-1] else ""
    return ""


def _place(exported: ExportedProgram, error: BaseException) -> str:
    """Return where in the model a conversion ended."""
    unknown = re.search(r"fx node (\S+),", str(error))
    return place_of(exported, unknown.group(1) if unknown else _converted(error.__traceback__))


def _converted(trace: TracebackType | None) -> str:
    """Return the name of the node that was converted: coremltools tells it to its log alone."""
    while trace is not None:
        if trace.tb_frame.f_code.co_name == "convert_single_node":
            name: Any = getattr(trace.tb_frame.f_locals.get("node"), "name", "")
            return str(name)
        trace = trace.tb_next
    return ""


def _first(text: str) -> str:
    """Return the first sentence of what a library says."""
    return re.split(r"(?<=\.)\s|\n", text.strip(), maxsplit=1)[0]
