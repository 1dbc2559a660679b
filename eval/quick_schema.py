"""A JSON schema as functions, for ten thousand documents of one kind.

    fits = compiled(schema)
    fits(document)

It knows the keywords that the schema of results has, and refuses a schema with others. What does
not fit is for `jsonschema` to tell of, which takes thirty times as long.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Fits = Callable[[Any], bool]

_TYPES: dict[str, Fits] = {
    "object": lambda value: type(value) is dict,
    "array": lambda value: type(value) is list,
    "string": lambda value: type(value) is str,
    "integer": lambda value: type(value) is int,
    "number": lambda value: type(value) in (int, float),
    "boolean": lambda value: type(value) is bool,
    "null": lambda value: value is None,
}
# What says nothing of values; `format` is checked by nobody unless it is asked for.
_WORDS = frozenset({"$schema", "$id", "$defs", "title", "description", "format"})


def compiled(schema: Mapping[str, Any]) -> Fits:
    """Return what says whether a value fits a schema.

    Raises:
        ValueError: the schema has a keyword that is not known here.
    """
    known: dict[str, Fits] = {}

    def fits(value: Any, name: str) -> bool:
        return known[name](value)

    for name, each in schema.get("$defs", {}).items():
        known[f"#/$defs/{name}"] = _compiled(each, fits)
    return _compiled(schema, fits)


def _compiled(schema: Any, refer: Callable[[Any, str], bool]) -> Fits:
    if isinstance(schema, bool):
        return lambda _: schema
    checks = []
    for keyword, told in schema.items():
        if keyword in _MAKERS:
            checks.append(_MAKERS[keyword](told, schema, refer))
        elif keyword not in _WORDS and keyword != "properties":
            raise ValueError(f"the keyword '{keyword}' is not known")
    if "properties" in schema and "additionalProperties" not in schema:
        checks.append(_members(True, schema, refer))
    return checks[0] if len(checks) == 1 else lambda value: all(check(value) for check in checks)


def _type(told: Any, _: Mapping[str, Any], __: object) -> Fits:
    names: Sequence[str] = [told] if isinstance(told, str) else told
    if len(names) == 1:
        return _TYPES[names[0]]
    return lambda value: any(_TYPES[name](value) for name in names)


def _members(told: Any, schema: Mapping[str, Any], refer: Callable[[Any, str], bool]) -> Fits:
    own = {name: _compiled(each, refer) for name, each in schema.get("properties", {}).items()}
    rest = _compiled(told, refer)

    def fits(value: Any) -> bool:
        if type(value) is not dict:
            return True
        return all(own.get(name, rest)(item) for name, item in value.items())

    return fits


def _items(told: Any, _: Mapping[str, Any], refer: Callable[[Any, str], bool]) -> Fits:
    one = _compiled(told, refer)
    return lambda value: type(value) is not list or all(map(one, value))


def _any_of(told: Any, _: Mapping[str, Any], refer: Callable[[Any, str], bool]) -> Fits:
    each = [_compiled(schema, refer) for schema in told]
    return lambda value: any(fits(value) for fits in each)


def _pattern(told: str, _: Mapping[str, Any], __: object) -> Fits:
    search = re.compile(told).search
    return lambda value: type(value) is not str or search(value) is not None


def _one_of(told: Sequence[Any], _: Mapping[str, Any], __: object) -> Fits:
    # 1 and 1.0 are equal to JSON, and so to Python; true is not 1.
    return lambda value: any(value == each and _kind(value) == _kind(each) for each in told)


def _kind(value: Any) -> object:
    return bool if type(value) is bool else None


def _number(holds: Callable[[Any, Any], bool], told: Any) -> Fits:
    return lambda value: type(value) not in (int, float) or holds(value, told)


def _length(
    kind: type[list[Any]] | type[str], holds: Callable[[Any, Any], bool], told: Any
) -> Fits:
    return lambda value: not isinstance(value, kind) or holds(len(value), told)


_MAKERS: dict[str, Callable[[Any, Mapping[str, Any], Callable[[Any, str], bool]], Fits]] = {
    "type": _type,
    "additionalProperties": _members,
    "items": _items,
    "anyOf": _any_of,
    "pattern": _pattern,
    "enum": _one_of,
    "const": lambda told, _, __: _one_of([told], _, __),
    "$ref": lambda told, _, refer: lambda value: refer(value, told),
    "required": lambda told, _, __: (
        lambda value: type(value) is not dict or all(name in value for name in told)
    ),
    "minimum": lambda told, _, __: _number(operator.ge, told),
    "maximum": lambda told, _, __: _number(operator.le, told),
    "minItems": lambda told, _, __: _length(list, operator.ge, told),
    "maxItems": lambda told, _, __: _length(list, operator.le, told),
    "minLength": lambda told, _, __: _length(str, operator.ge, told),
    "maxLength": lambda told, _, __: _length(str, operator.le, told),
}
