"""Manifests that are wrong in one place: another type, an absurd number, a text that is none.

    for name, text in wrong_manifests(manifest): (folder / "manifest.json").write_bytes(text)

Each is sealed again, so that nothing but its content can refuse it.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from typing import Any

from llm_coreml.bundle.seal import checksum

Place = tuple[str | int, ...]

WRONG: dict[str, Any] = {
    "null": None,
    "true": True,
    "zero": 0,
    "minus one": -1,
    "a million": 1_000_000,
    "2^31": 1 << 31,
    "2^63": 1 << 63,
    "400 digits": 10**400,
    "half": 0.5,
    "whole float": 8.0,
    "nan": math.nan,
    "infinite": math.inf,
    "1e308": 1e308,
    "empty text": "",
    "word": "word",
    "number as text": "8",
    "path": "../../etc/passwd",
    "escapes": "\x1b[31m\r\n\u202e\x00",
    "surrogate": "\ud800",
    "long text": "x" * 100_000,
    "empty list": [],
    "list": [1, "a", None],
    "empty object": {},
    "object": {"a": {"b": [1]}},
    "absent": ...,
}


def places(value: Any, at: Place = ()) -> Iterator[Place]:
    """Yield where everything inside of `value` is."""
    keys: Any = ()
    if isinstance(value, dict):
        keys = value
    elif isinstance(value, list):
        keys = range(min(len(value), 2))
    for key in keys:
        yield (*at, key)
        yield from places(value[key], (*at, key))


def changed(manifest: dict[str, Any], place: Place, wrong: Any) -> dict[str, Any]:
    """Return a copy with something else at `place`, or nothing for `...`."""
    copied = copy.deepcopy(manifest)
    *way, last = place
    holder: Any = copied
    for key in way:
        holder = holder[key]
    if wrong is ...:
        del holder[last]
    else:
        holder[last] = wrong
    return copied


def sealed_text(manifest: dict[str, Any]) -> bytes:
    """Return a manifest's file, with the checksum that belongs to it if it has one."""
    if isinstance(manifest.get("checksum"), str):
        manifest["checksum"] = checksum(manifest)
    return json.dumps(manifest).encode()


def broken_texts(manifest: dict[str, Any]) -> dict[str, bytes]:
    """Return files that are no manifest at all, or that a parser may choke on."""
    text = json.dumps(manifest)
    return {
        "empty": b"",
        "blank": b" \n",
        "half": text[: len(text) // 2].encode(),
        "utf-16": text.encode("utf-16"),
        "latin-1": b'{"version": "\xe9"}',
        "with a mark": b"\xef\xbb\xbf" + text.encode(),
        "null": b"null",
        "number": b"1e999",
        "list": b"[]",
        "twice": text.replace('"version"', '"version": 3, "version"', 1).encode(),
        "deep lists": b"[" * 100_000,
        "deep objects": b'{"a":' * 100_000,
        "deep and closed": b"[" * 500 + b"]" * 500,
        "deep key": text.replace("{", '{"extra": ' + "[" * 40 + "]" * 40 + ", ", 1).encode(),
        "digits": b"1" * 1_000_000,
        "long key": json.dumps({**manifest, "k" * 100_000: 1}).encode(),
        "huge": text.encode() + b" " * (1 << 23),
        "zeros": bytes(1 << 16),
    }
