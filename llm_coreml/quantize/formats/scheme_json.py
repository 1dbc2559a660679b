"""A scheme as JSON: the name of its class, and its fields.

{"type": "Codebook", "bits": 3, ...}
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from types import MappingProxyType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from llm_coreml.errors import ConfigError, nearest
from llm_coreml.quantize.formats.schemes import (
    CODEBOOK_BITS,
    GROUP_BITS,
    INTEGER_BITS,
    Codebook,
    IntChannel,
    IntGroup,
    Mxfp4,
    Scheme,
    TableGroup,
    Unquantized,
)

_BITS: Mapping[type[Scheme], tuple[int, ...]] = MappingProxyType(
    {
        Codebook: CODEBOOK_BITS,
        IntGroup: GROUP_BITS,
        IntChannel: INTEGER_BITS,
        Mxfp4: (4,),
        TableGroup: CODEBOOK_BITS,
        Unquantized: (16, 32),
    }
)
_TYPES = {kind.__name__: kind for kind in _BITS}


def scheme_json(scheme: Scheme) -> dict[str, Any]:
    """Return what `scheme_from_json` reads."""
    return {"type": type(scheme).__name__, **asdict(scheme)}  # type: ignore[call-overload]


def scheme_from_json(entry: object) -> Scheme:
    """Build a scheme from the name of its class and all of its fields.

    Raises:
        ConfigError: there is no such scheme.
        UnsupportedError: it cannot be.
    """
    kind = entry.get("type") if isinstance(entry, dict) else None
    if not isinstance(entry, dict) or not isinstance(kind, str) or kind not in _TYPES:
        raise ConfigError(
            f"there is no scheme {shown(kind)}; the schemes are {', '.join(_TYPES)}."
            + nearest(str(kind), _TYPES)
        )
    given = {key: value for key, value in entry.items() if key != "type"}
    hints = get_type_hints(_TYPES[kind])
    names = [field.name for field in fields(_TYPES[kind])]  # type: ignore[arg-type]
    if set(given) != set(names):
        raise ConfigError(f"a {kind} has the fields {', '.join(names)}, not {shown(list(given))}.")
    for key, value in given.items():
        if not _fits(value, hints[key]):
            raise ConfigError(f"{key} of a {kind} is {shown(value)}, which it cannot be.")
    scheme = _TYPES[kind](**given)
    if scheme.bits not in _BITS[_TYPES[kind]]:
        allowed = ", ".join(map(str, _BITS[_TYPES[kind]]))
        raise ConfigError(f"a {kind} has {allowed} bits, not {scheme.bits}.")
    return scheme


def _fits(value: object, hint: Any) -> bool:
    """Return whether a JSON value is of a field's type; true is no number."""
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    return type(value) in (get_args(hint) or (hint,))


def shown(value: object) -> str:
    """Return a value as an error can show it."""
    text = ascii(value)
    return text if len(text) <= 60 else text[:60] + "..."
