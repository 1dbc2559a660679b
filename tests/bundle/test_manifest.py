"""The typed manifest and its JSON schema say the same, and earlier manifests are still read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import jsonschema
import pytest

from exported import manifest_of
from llm_coreml.bundle.bundle_runner import open_runner
from llm_coreml.bundle.folder import MANIFEST, open_bundle
from llm_coreml.bundle.manifest import Manifest, manifest_schema
from llm_coreml.bundle.typed_json import (
    LEFT_OUT,
    hints_of,
    inner_hint,
    key_of,
    named,
    read_record,
    write_record,
)

SCHEMA = manifest_schema()
SCALARS = {str: "string", int: "integer", float: "number", bool: "boolean"}


def resolved(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> Mapping[str, Any]:
    name = schema.get("$ref")
    return schema if name is None else definitions[name.removeprefix("#/$defs/")]


def nullable(hint: Any) -> bool:
    return get_origin(hint) in (Union, UnionType) and type(None) in get_args(hint)


def differences(
    hint: Any, schema: Mapping[str, Any], definitions: Mapping[str, Any], where: str
) -> Iterator[str]:
    """Yield where a type and a schema differ; of keys that are left out, None is no value."""
    schema = resolved(schema, definitions)
    kind, told = kind_of(hint), schema.get("type")
    expected = [kind, "null"] if nullable(hint) else kind
    if told != expected:
        yield f"{where}: {told} in the schema, {expected} in the dataclass"
    hint = inner_hint(hint)
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Literal and list(parts) != schema.get("enum"):
        yield f"{where}: {schema.get('enum')} in the schema, {list(parts)} in the dataclass"
    elif origin is tuple:
        yield from differences(parts[0], schema["items"], definitions, f"{where}[]")
    elif origin is Mapping and "additionalProperties" in schema:
        yield from differences(parts[1], schema["additionalProperties"], definitions, f"{where}.*")
    elif is_dataclass(hint):
        yield from record_differences(hint, schema, definitions, where)


def record_differences(
    kind: Any, schema: Mapping[str, Any], definitions: Mapping[str, Any], where: str
) -> Iterator[str]:
    known = {key_of(item): item for item in fields(kind)}
    required = {key for key, item in known.items() if item.default is not None}
    if required != set(schema.get("required", ())):
        yield f"{where}: {required} without a default, {schema.get('required')} required"
    properties = schema.get("properties", {})
    if known.keys() != properties.keys():
        yield f"{where}: {set(known) ^ set(properties)} in one of them alone"
    for key in known.keys() & properties.keys():
        hint = hints_of(kind)[known[key].name]
        if known[key].metadata == LEFT_OUT:
            hint = inner_hint(hint)
        yield from differences(hint, properties[key], definitions, f"{where}.{key}")


def kind_of(hint: Any) -> str:
    hint = inner_hint(hint)
    if get_origin(hint) is Literal:
        return SCALARS[type(get_args(hint)[0])]
    if get_origin(hint) is tuple:
        return "array"
    return "object" if get_origin(hint) is Mapping or is_dataclass(hint) else SCALARS[hint]


def test_the_schema_is_that_of_the_dataclasses() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert list(differences(Manifest, SCHEMA, SCHEMA["$defs"], "$")) == []


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (lambda s: s["properties"].pop("rebuild"), "$: "),
        (lambda s: s["required"].remove("spec"), "$: "),
        (lambda s: s["properties"]["program"]["properties"].pop("form"), "$.program: "),
        (lambda s: s["$defs"]["group"]["properties"].update(bits={"type": "integer"}), "bits: "),
        (lambda s: s["$defs"]["method"]["required"].remove("output"), "$.program.methods.*: "),
        (lambda s: s["$defs"]["lengths"].update(items={"type": "number"}), "seq_lengths[]: "),
        (lambda s: s["$defs"]["matrix"]["properties"].update(kl={"type": "string"}), "kl: "),
        (lambda s: s["properties"]["source"]["properties"]["kind"]["enum"].pop(), "kind: "),
        (lambda s: s["$defs"]["rotation"].update(type="object"), "rotation.heads: "),
    ],
)
def test_a_schema_that_differs_is_noticed(
    change: Callable[[dict[str, Any]], Any], where: str
) -> None:
    schema = manifest_schema()
    change(schema)
    found = list(differences(Manifest, schema, schema["$defs"], "$"))
    assert any(where in line for line in found), found


def test_json_is_read_and_written_as_it_is(bundle: Path) -> None:
    recorded = manifest_of(bundle)
    manifest = Manifest.from_json(recorded)
    assert manifest.to_json() == recorded
    assert Manifest.from_json(json.loads(json.dumps(manifest.to_json()))) == manifest
    assert manifest.program.seq_lengths == (1, 8) and manifest.quantization.imported is None


def earlier(recorded: dict[str, Any]) -> dict[str, Any]:
    """Return a manifest as the first releases of version 1 wrote it."""
    for key in ("rotation", "calibration", "allocation", "plan", "import"):
        recorded["quantization"].pop(key)
    for key in ("form", "every_row", "methods"):
        recorded["program"].pop(key)
    recorded["verification"].pop("conversion")
    for key in ("files", "checksum"):
        recorded.pop(key)
    recorded["version"] = 1
    return recorded


@pytest.fixture
def own_bundle(bundle: Path, tmp_path: Path) -> Path:
    """A copy that a test may write to."""
    return Path(shutil.copytree(bundle, tmp_path / "own"))


def test_earlier_manifests_are_read(own_bundle: Path) -> None:
    written = open_bundle(own_bundle).manifest
    assert written.version == 3
    described = written.description
    (own_bundle / MANIFEST).write_text(json.dumps(earlier(manifest_of(own_bundle))))
    manifest = open_bundle(own_bundle).manifest
    assert manifest.version == 1
    assert manifest.quantization.plan is None and manifest.plan_json() is None
    assert manifest.verification.conversion is None
    assert manifest.description.methods == described.methods
    assert manifest.description.every_row is described.every_row is False
    jsonschema.validate(manifest.to_json(), SCHEMA)
    assert open_runner(open_bundle(own_bundle)).seq_lengths == (1, 8)
    recorded = manifest.to_json()
    recorded["program"]["output"] = "float32 [1, S, 300]"
    assert Manifest.from_json(recorded).description.every_row


def test_a_bundle_is_printed_as_a_small_table(bundle: Path) -> None:
    opened = open_bundle(bundle)
    size = opened.program.stat().st_size
    assert str(bundle) in repr(opened) and "\n" not in repr(opened)
    assert len(repr(opened)) < 250 + len(str(bundle))
    title, program, weights, *rest = str(opened).splitlines()
    assert title.startswith(f"{bundle}: ") and program.endswith(f"{size:,} bytes")
    assert "int4 group 32" in weights and len(rest) == 3


@dataclass(frozen=True)
class Inner:
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class Outer:
    inner: Inner
    parts: Mapping[str, Inner]
    free: Mapping[str, Any]
    none: Inner | None = None
    absent: Inner | None = field(default=None, metadata=LEFT_OUT)
    lambda_: str | None = field(default=None, metadata=named("lambda"))


def test_records() -> None:
    value = {
        "inner": {"sizes": [1, 2]},
        "parts": {"a": {"sizes": []}},
        "free": {"list": [1], "none": None},
        "none": None,
        "lambda": "x",
    }
    record = read_record(Outer, {**value, "later": 1})
    assert record == Outer(
        Inner((1, 2)), {"a": Inner(())}, {"list": [1], "none": None}, lambda_="x"
    )
    assert write_record(record) == value
    assert "absent" in write_record(read_record(Outer, {**value, "absent": {"sizes": [3]}}))
