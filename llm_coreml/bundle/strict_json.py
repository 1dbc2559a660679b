"""JSON from a file that nobody vouches for: parsed only as far as an honest file goes.

    manifest = parse(path.read_bytes())
    error = next(validator(schema).iter_errors(manifest), None)

Beyond what `json` checks, a key stands once in its object, numbers are finite and fit 64 bits,
strings are whole and of bounded length, and nothing nests deeper than any record here does.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jsonschema

# No number of 64 bits has more digits, its sign included.
_DIGITS = 20
_INT64 = range(-(1 << 63), 1 << 63)
_LONGEST_TEXT = 1 << 14
_LONGEST_KEY = 1 << 10
_DEEPEST = 32
_SHOWN = 40


def parse(data: bytes) -> Any:
    """Return the value of a JSON text in UTF-8.

    Raises:
        ValueError: it is no JSON, or breaks a bound; the message names the place.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is no UTF-8") from None
    try:
        value = json.loads(
            text,
            object_pairs_hook=_object,
            parse_int=_integer,
            parse_float=_number,
            parse_constant=_number,
        )
    except RecursionError:
        raise ValueError(f"it nests deeper than {_DEEPEST} levels") from None
    if not _harmless(value):
        for where, inner in _walk(value):
            if isinstance(inner, str):
                _check_text(inner, where)
    return value


def validator(schema: Mapping[str, Any]) -> Any:
    """Return what holds a value against a schema, by which 1.0 is no integer."""
    plain = jsonschema.Draft202012Validator
    types = plain.TYPE_CHECKER.redefine("integer", lambda _, value: type(value) is int)
    extend: Any = jsonschema.validators.extend  # untyped
    return extend(plain, type_checker=types)(schema)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"it holds the key '{key[:_SHOWN]}' twice in one object")
        if len(key) > _LONGEST_KEY:
            raise ValueError(f"it holds a key of {len(key):,} characters, '{key[:_SHOWN]}...'")
        _check_text(key, "a key")
        found[key] = value
    return found


def _check_text(text: str, where: str) -> None:
    if len(text) > _LONGEST_TEXT:
        raise ValueError(f"{where} is a text of {len(text):,} characters")
    # JSON may escape halves of characters, which nobody can print.
    if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ValueError(f"{where} holds half a character (a lone surrogate)")


def _harmless(value: Any) -> bool:
    """Return whether all texts are short and of ASCII, and nothing nests too deep: most often."""
    level = [value]
    for _ in range(_DEEPEST + 1):
        below: list[Any] = []
        for inner in level:
            if isinstance(inner, dict):
                below += inner.values()
            elif isinstance(inner, list):
                below += inner
            elif isinstance(inner, str) and not (len(inner) <= _LONGEST_TEXT and inner.isascii()):
                return False
        if not below:
            return True
        level = below
    return False


def _integer(digits: str) -> int:
    value = int(digits) if len(digits) <= _DIGITS else None
    if value is None or value not in _INT64:
        raise ValueError(f"it holds the number {digits[:_SHOWN]}, which takes more than 64 bits")
    return value


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"it holds the number {text[:_SHOWN]}, which is not finite")
    return value


def _walk(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield the path and the value of everything that is no container.

    Raises:
        ValueError: it nests too deep.
    """
    pending: list[tuple[str, int, Any]] = [("$", 0, value)]
    while pending:
        where, depth, inner = pending.pop()
        if depth > _DEEPEST:
            raise ValueError(f"it nests deeper than {_DEEPEST} levels")
        if isinstance(inner, dict):
            pending += [(f"{where}.{key}", depth + 1, item) for key, item in inner.items()]
        elif isinstance(inner, list):
            pending += [(f"{where}[{at}]", depth + 1, item) for at, item in enumerate(inner)]
        else:
            yield where, inner
