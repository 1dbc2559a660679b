from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from executorch.backends.apple.coreml import executorchcoreml
from hypothesis import given
from hypothesis import strategies as st

from llm_coreml.artifact.inmemoryfs import pack, unpack
from llm_coreml.errors import ArtifactError

FILES = {
    "metadata.json": b"{}",
    "model.mlpackage/Manifest.json": b'{"a": "}{"}',
    "model.mlpackage/Data/com.apple.CoreML/model.mlmodel": bytes(range(256)),
    "model.mlpackage/Data/com.apple.CoreML/weights/weight.bin": b"\0" * 77,
}


def write(folder: Path, files: dict[str, bytes]) -> None:
    for path, content in files.items():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)


def as_bytes(files: dict[str, memoryview]) -> dict[str, bytes]:
    return {path: bytes(view) for path, view in files.items()}


def test_reads_what_executorch_writes(tmp_path: Path) -> None:
    write(tmp_path, {**FILES, 'odd "name" {é}.txt': b"x"})
    blob = executorchcoreml.flatten_directory_contents(str(tmp_path))
    assert as_bytes(unpack(blob)) == {**FILES, 'odd "name" {é}.txt': b"x"}


def test_executorch_reads_what_we_write(tmp_path: Path) -> None:
    assert executorchcoreml.unflatten_directory_contents(pack(FILES), str(tmp_path))
    for path, content in FILES.items():
        assert (tmp_path / "lowered_module" / path).read_bytes() == content


def test_pack_does_not_depend_on_order() -> None:
    assert pack(FILES) == pack(dict(reversed(FILES.items())))


def test_unpack_copies_nothing() -> None:
    blob = pack(FILES)
    view = unpack(blob)["model.mlpackage/Data/com.apple.CoreML/model.mlmodel"]
    assert view.obj is blob


NAMES = st.text('ab{}"\\é ', min_size=1, max_size=3).filter(lambda name: "\\" not in name)
PATHS = st.lists(NAMES, min_size=1, max_size=3).map("/".join)


@given(st.dictionaries(PATHS, st.binary(max_size=9), max_size=5))
def test_round_trip(files: dict[str, bytes]) -> None:
    folders = {
        "/".join(path.split("/")[:n]) for path in files for n in range(1, path.count("/") + 1)
    }
    if folders & set(files):
        with pytest.raises(ArtifactError):
            pack(files)
    else:
        assert as_bytes(unpack(pack(files))) == files


def test_zero_bytes_behind_the_index_are_tolerated() -> None:
    # ExecuTorch's writer leaves some for folders above 1 GiB.
    assert as_bytes(unpack(pack(FILES) + bytes(33))) == FILES


@pytest.mark.parametrize("path", ["", "/a", "../a", "a/../b", "a//b", "./a", "a\0b"])
def test_pack_refuses_unsafe_paths(path: str) -> None:
    with pytest.raises(ArtifactError, match="must not hold"):
        pack({path: b""})


def blob_of(nodes: Any, data: bytes = b"0123456789") -> bytes:
    return data + json.dumps({"nodes": nodes}).encode()[::-1]


def file_node(name: str = "f", offset: Any = 0, size: Any = 1) -> dict[str, Any]:
    return {"name": name, "kind": 0, "dataRegion": {"offset": offset, "size": size}, "children": {}}


def folder_node(children: dict[str, Any], name: str = "root") -> dict[str, Any]:
    region = {"offset": 0, "size": 0}
    return {"name": name, "kind": 1, "dataRegion": region, "children": children}


HOSTILE = {
    "beyond the data": [file_node(offset=5, size=6), folder_node({"f": 0})],
    "huge offset": [file_node(offset=1 << 62), folder_node({"f": 0})],
    "negative offset": [file_node(offset=-1), folder_node({"f": 0})],
    "fractional size": [file_node(size=1.5), folder_node({"f": 0})],
    "size is a bool": [file_node(size=True), folder_node({"f": 0})],
    "cycle": [file_node(), folder_node({"d": 1})],
    "mutual cycle": [folder_node({"b": 1}), folder_node({"a": 0}), folder_node({"a": 0})],
    "child out of range": [file_node(), folder_node({"f": 7})],
    "negative child": [file_node(), folder_node({"f": -1})],
    "shared node": [file_node(), folder_node({"f": 0, "g": 0})],
    "parent folder": [file_node(), folder_node({"..": 0})],
    "absolute": [file_node(), folder_node({"/etc/passwd": 0})],
    "nested name": [file_node(), folder_node({"a/b": 0})],
    "backslash": [file_node(), folder_node({"a\\b": 0})],
    "empty name": [file_node(), folder_node({"": 0})],
    "zero byte": [file_node(), folder_node({"a\0": 0})],
    "root is a file": [file_node()],
    "nothing": [],
    "unknown kind": [{**file_node(), "kind": 2}],
    "nodes is no list": {"a": 1},
    "node is no object": [1],
    "missing field": [{"name": "f"}],
    "too deep": [
        file_node(),
        *({**folder_node({"d" if n else "f": n}), "name": str(n)} for n in range(70)),
    ],
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_index_is_refused(what: str) -> None:
    with pytest.raises(ArtifactError) as caught:
        unpack(blob_of(HOSTILE[what]))
    assert "\n" not in str(caught.value)


def test_duplicate_names_are_refused() -> None:
    text = json.dumps({"nodes": [file_node(), file_node(), folder_node({"f": 0, "g": 1})]})
    with pytest.raises(ArtifactError, match="twice"):
        unpack(text.replace('"g"', '"f"').encode()[::-1])


@pytest.mark.parametrize(
    "blob",
    [
        b"",
        b"\0" * 9000,
        b"garbage",
        b"{"[::-1],
        b'{"nodes": ['[::-1],
        b"CMJR{}",
        b"}{",
        b'}"\xff"{',
    ],
)
def test_garbage_is_refused(blob: bytes) -> None:
    with pytest.raises(ArtifactError):
        unpack(blob)


def test_every_truncation_is_refused() -> None:
    blob = pack(FILES)
    for size in range(len(blob)):
        with pytest.raises(ArtifactError):
            unpack(blob[:size])


@given(st.binary(max_size=200))
def test_random_tails_never_escape(tail: bytes) -> None:
    with contextlib.suppress(ArtifactError):
        unpack(b"0123" + tail + b"{")


def test_quotes_without_end_are_scanned_once() -> None:
    with pytest.raises(ArtifactError, match="no end"):
        unpack((b"{" + b'"\\' * 1_000_000)[::-1])
