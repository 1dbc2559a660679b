"""Frozen dataclasses as JSON objects and back: a field for each key.

    manifest = read_record(Manifest, json.loads(text))
    json.dumps(write_record(manifest))

A field that defaults to None may be absent from an object. Metadata tells the rest: `named(key)`
where Python keeps the key for itself, `LEFT_OUT` where None leaves no key behind. What is read has
been held against a schema before, so that nothing is checked here.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Mapping
from dataclasses import Field, fields, is_dataclass
from typing import Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

Record = TypeVar("Record")
_KEY = "key"
# Metadata of a field that is not written where it is None.
LEFT_OUT: Mapping[str, bool] = types.MappingProxyType({"left out": True})


def named(key: str) -> Mapping[str, str]:
    """Return the metadata of a field that is called `key` in JSON."""
    return {_KEY: key}


def key_of(item: Field[Any]) -> str:
    """Return what a dataclass field is called in JSON."""
    return str(item.metadata.get(_KEY, item.name))


@functools.cache
def hints_of(kind: type[Any]) -> dict[str, Any]:
    """Return the types of a dataclass's fields by their names in Python."""
    return get_type_hints(kind)


def inner_hint(hint: Any) -> Any:
    """Return X for the hint `X | None`, any other hint as it is."""
    if get_origin(hint) in (Union, types.UnionType):
        rest = [part for part in get_args(hint) if part is not type(None)]
        return rest[0] if len(rest) == 1 else hint
    return hint


def read_record(kind: type[Record], value: Mapping[str, Any]) -> Record:
    """Return the dataclass `kind` of a JSON object; keys that it does not know are passed over."""
    hints = hints_of(cast(Any, kind))
    found = {
        item.name: _read(hints[item.name], value[key_of(item)])
        for item in fields(cast(Any, kind))
        if key_of(item) in value
    }
    return kind(**found)


def _read(hint: Any, value: Any) -> Any:
    hint = inner_hint(hint)
    if value is None:
        return None
    if isinstance(hint, type) and is_dataclass(hint):
        return read_record(hint, value)
    origin, parts = get_origin(hint), get_args(hint)
    if origin is tuple:
        return tuple(_read(parts[0], item) for item in value)
    if origin is Mapping:
        return {name: _read(parts[1], item) for name, item in value.items()}
    return value


def write_record(record: Any) -> dict[str, Any]:
    """Return the JSON object of a dataclass, in the order of its fields."""
    written = {}
    for item in fields(record):
        value = getattr(record, item.name)
        if value is not None or item.metadata != LEFT_OUT:
            written[key_of(item)] = _written(value)
    return written


def _written(value: Any) -> Any:
    if is_dataclass(value):
        return write_record(value)
    if isinstance(value, Mapping):
        return {name: _written(item) for name, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_written(item) for item in value]
    return value
