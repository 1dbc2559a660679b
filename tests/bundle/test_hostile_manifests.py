"""A manifest that is wrong in any one field ends in one sentence that names it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from exported import manifest_of
from hostile import WRONG, broken_texts, changed, places, sealed_text
from llm_coreml.bundle.folder import MANIFEST, open_bundle
from llm_coreml.bundle.strict_json import parse
from llm_coreml.cli.tables import contents_table
from llm_coreml.errors import ArtifactError
from llm_coreml.inspect.contents import contents

# What is of no type that any field has, or of no text at all.
NEVER = ("list", "object", "400 digits", "nan", "infinite", "surrogate", "long text", "2^63")


@pytest.fixture
def own_bundle(bundle: Path, tmp_path: Path) -> Path:
    """A copy that a test may write to."""
    return Path(shutil.copytree(bundle, tmp_path / "own"))


def refusal(folder: Path, text: bytes) -> str:
    """Return what opening says of another manifest, "" if it opens and can be shown."""
    (folder / MANIFEST).write_bytes(text)
    try:
        open_bundle(folder)
    except ArtifactError as error:
        told = str(error)
        assert str(folder / MANIFEST) in told and told.isprintable() and len(told) < 1200
        assert "xport again" in told
        return told
    contents_table(contents(folder))
    return ""


def test_files_that_are_no_manifest(own_bundle: Path) -> None:
    for name, text in broken_texts(manifest_of(own_bundle)).items():
        assert refusal(own_bundle, text), name


@pytest.mark.parametrize("kind", NEVER)
def test_no_field_takes(kind: str, own_bundle: Path) -> None:
    manifest = manifest_of(own_bundle)
    taken = [
        place
        for place in places(manifest)
        # Matrices are alike, and layers.
        if place[:3] != ("quantization", "plan", "matrices") or "q_proj" in str(place)
        # It is sealed again, with the right one.
        if place != ("checksum",)
        if not refusal(own_bundle, sealed_text(changed(manifest, place, WRONG[kind])))
    ]
    assert taken == []


@pytest.mark.parametrize(
    ("place", "wrong", "told"),
    [
        (("program", "context"), 64.0, "$.program.context: 64.0 is not of type 'integer'"),
        (("program", "context"), True, "$.program.context: True is not of type 'integer'"),
        (("program", "seq_lengths"), [1, 4], "contradicts itself at $.program.seq_lengths"),
        (("program", "method"), "main", "$.program.method: there is no method 'main'"),
        (("program", "methods"), {}, "$.program.methods"),
        (("program", "constant_methods", "get_eos_ids"), [None], "get_eos_ids[0]: None is not"),
        (("quantization", "linear", "bits"), -4, "$.quantization.linear.bits: -4 is less than"),
        (("quantization", "bits_per_weight"), 1e308, "$.quantization.bits_per_weight: 1e+308"),
        (("spec", "layers", 0, "mixer", "qkv_bias"), "no", "mixer.qkv_bias: 'no' is not of type"),
        (("config", "weights", "bits"), 5, "$.config: --bits is 5"),
        (("config", "weights", "bit"), 4, "$.config: weights has no key 'bit'"),
        (("config", "target", "minimum_os"), "iOS13", "$.config: "),
        (("files", "../x"), {"bytes": 1, "sha256": "0" * 64}, "$.files: '../x' does not match"),
        (("checksum",), ..., "$: 'checksum' is a required property"),
        (("files",), ..., "$: 'files' is a required property"),
        (("version",), True, "has version True; this release reads versions 1, 2 and 3"),
        (("version",), 3.0, "has version 3.0"),
        (("source", "name"), "n" * 20_000, "$.source.name is a text of 20,000 characters"),
    ],
)
def test_what_is_wrong_is_named(
    own_bundle: Path, place: tuple[str | int, ...], wrong: Any, told: str
) -> None:
    text = sealed_text(changed(manifest_of(own_bundle), place, wrong))
    assert told in refusal(own_bundle, text)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (b'{"a": 1, "a": 2}', "holds the key 'a' twice"),
        (b'{"a": [NaN]}', "the number NaN, which is not finite"),
        (b"[1e999]", "the number 1e999, which is not finite"),
        (b"[9223372036854775808]", "9223372036854775808, which takes more than 64 bits"),
        (b"[" + b"9" * 5000 + b"]", "takes more than 64 bits"),
        (b"[" * 33 + b"]" * 33 + b" ", None),
        (b"[" * 34 + b"1" + b"]" * 34, "nests deeper than 32 levels"),
        (b"[" * 100_000, "nests deeper than 32 levels"),
        (b'["\\ud83d"]', r"\$\[0\] holds half a character"),
        (b'{"\\ud83d": 1}', "a key holds half a character"),
        (b"\xff", "byte 0 is no UTF-8"),
        (b"", "Expecting value"),
    ],
)
def test_strict_json(text: bytes, told: str | None) -> None:
    if told is None:
        assert parse(text) == json.loads(text)
        return
    with pytest.raises(ValueError, match=told):
        parse(text)


def test_honest_json_is_read_as_it_is(bundle: Path) -> None:
    text = (bundle / MANIFEST).read_bytes()
    assert parse(text) == json.loads(text)
    assert parse('{"a": ["\U0001f600", -9223372036854775808, 1e-7, true, null]}'.encode()) == {
        "a": ["\U0001f600", -(1 << 63), 1e-7, True, None]
    }
