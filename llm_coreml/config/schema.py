"""The JSON schema of settings, made from their fields, and what is wrong with a file by it.

schema = sections_schema(SECTIONS)
complaint({"weights": {"bit": 4}}, schema)     # "weights has no key 'bit'. Did you mean 'bits'?"
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llm_coreml.config.setting import KINDS, Setting, brief, settings_of
from llm_coreml.errors import nearest

_TYPES = {bool: "boolean", int: "integer", float: "number", str: "string"}
_WORDS = {
    **{_TYPES[kind]: words for kind, words in KINDS.items()},
    "array": "a list",
    "object": "a section of keys and values",
    "null": "null",
}


def sections_schema(sections: Mapping[str, Any]) -> dict[str, Any]:
    """Return the schema of an object that holds sections of settings, any of which may be absent.

    Args:
        sections: Dataclasses of settings by the names of their sections.
    """
    return {
        "type": "object",
        "additionalProperties": False,
        "properties": {
            title: {
                "type": "object",
                "additionalProperties": False,
                "properties": {each.name: _schema(each) for each in settings_of(section)},
            }
            for title, section in sections.items()
        },
    }


def _schema(setting: Setting) -> dict[str, Any]:
    default = list(setting.default) if isinstance(setting.default, tuple) else setting.default
    described: dict[str, Any] = {"description": setting.about, "default": default}
    if setting.choices:
        absent = [None] if setting.optional else []
        return {**described, "enum": [*setting.choices, *absent]}
    types = ["array" if setting.many else _TYPES[setting.kind]]
    if setting.many:
        described["items"] = {"type": _TYPES[setting.kind]}
    if setting.read is not None:
        types.append("string")
    if setting.mapping:
        types.append("object")
        described["additionalProperties"] = {"type": ["string", "null"]}
    if setting.optional:
        types.append("null")
    return {**described, "type": types}


def complaint(values: object, schema: dict[str, Any]) -> str | None:
    """Return what `schema` refuses of `values` first, as a sentence; None if it is nothing."""
    # Imported here: the help page reads settings too, and has nothing to validate.
    import jsonschema

    errors = jsonschema.Draft202012Validator(schema).iter_errors(values)
    found = min(errors, key=lambda error: list(map(str, error.absolute_path)), default=None)
    if found is None:
        return None
    where = ".".join(map(str, found.absolute_path))
    if found.validator == "additionalProperties":
        return _unknown_key(where, found.instance, found.schema["properties"], schema)
    if found.validator == "required":
        (absent, *_) = [key for key in found.validator_value if key not in found.instance]
        return f"{where or 'The file'} lacks the key '{absent}'."
    told = f"{where or 'The file'} is {brief(found.instance)}; it must be "
    if found.validator == "enum":
        return told + " or ".join(each for each in found.validator_value if each) + "."
    if found.validator == "type":
        types = found.validator_value
        kinds = [types] if isinstance(types, str) else types
        return told + " or ".join(_WORDS[kind] for kind in kinds) + "."
    return told + f"of {found.validator} {found.validator_value}."


def _unknown_key(
    where: str, given: Mapping[str, Any], known: Mapping[str, Any], schema: dict[str, Any]
) -> str:
    key = next(key for key in given if key not in known)
    told = f"{where} has no key '{key}'" if where else f"There is no key '{key}'"
    for title, section in schema["properties"].items():
        if key in section.get("properties", {}):
            return f"{told}; it belongs to {title}."
    return f"{told}.{nearest(str(key), known)}"
