"""Reader and writer of the blob in which ExecuTorch stores a folder for its Core ML delegate.

The files' bytes are concatenated; an index in JSON follows, written back to front, so that a
reader finds its opening brace as the last byte. Reading needs no Apple library and copies nothing.

    files = unpack(blob)
    model = files["model.mlpackage/Data/com.apple.CoreML/model.mlmodel"]

The index lists nodes in post-order; a folder names its children by their number, and the last node
is the root. ExecuTorch aligns the files of a folder above 1 GiB to pages and packs others densely;
readers go by the offsets alone.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from llm_coreml.errors import ArtifactError

_FILE, _FOLDER = 0, 1
_PAGE = 16384
_LARGE = 1 << 30
_MAX_INDEX = 1 << 24
_MAX_DEPTH = 64
# ExecuTorch's writer counts the header of Python's bytes object for folders above 1 GiB, which
# leaves a few zero bytes behind the index.
_MAX_SLACK = 4096
# A string without an end swallows the rest, which keeps the scan linear on hostile data.
_TOKEN = re.compile(rb'"[^"\\]*(?:\\.?[^"\\]*)*(?:"|\Z)|[{}]', re.DOTALL)


@dataclass(frozen=True)
class _Node:
    name: str
    kind: int
    offset: int
    size: int
    children: tuple[tuple[str, int], ...]


def unpack(blob: bytes | memoryview) -> dict[str, memoryview]:
    """Return the files of `blob` as views into it.

    Args:
        blob: the bytes that ExecuTorch hands to its Core ML delegate.

    Returns:
        Relative POSIX path to content, sorted by path. The root folder's own name is dropped, as
        ExecuTorch's runtime does.

    Raises:
        ArtifactError: the index is absent, damaged, or points where it must not.
    """
    data = memoryview(blob).cast("B")
    text, index_size = _index_text(data)
    nodes = _parse(text)
    end = len(data) - index_size
    files: dict[str, memoryview] = {}
    visited: set[int] = set()
    root = len(nodes) - 1
    if nodes[root].kind != _FOLDER:
        raise ArtifactError("The Core ML blob's root is a file, not a folder.")
    pending: list[tuple[int, tuple[str, ...]]] = [(root, ())]
    while pending:
        number, path = pending.pop()
        if number in visited:
            raise ArtifactError(
                f"The Core ML blob's index reaches node {number} twice; a folder tree cannot."
            )
        visited.add(number)
        node = nodes[number]
        if node.kind == _FOLDER:
            if len(path) >= _MAX_DEPTH:
                raise ArtifactError(f"The Core ML blob's folders nest deeper than {_MAX_DEPTH}.")
            pending += [(child, (*path, name)) for name, child in node.children]
            continue
        if node.offset + node.size > end:
            raise ArtifactError(
                f"The Core ML blob is truncated: '{'/'.join(path)}' should end at byte "
                f"{node.offset + node.size}, but the data ends at {end}."
            )
        files["/".join(path)] = data[node.offset : node.offset + node.size]
    _check_overlap([nodes[number] for number in visited if nodes[number].kind == _FILE])
    return dict(sorted(files.items()))


def _check_overlap(nodes: list[_Node]) -> None:
    regions = sorted((node.offset, node.offset + node.size) for node in nodes if node.size)
    for (_, end), (start, _) in itertools.pairwise(regions):
        if start < end:
            raise ArtifactError(
                f"Two files of the Core ML blob overlap: one ends at byte {end}, another starts at "
                f"{start}."
            )


def pack(files: Mapping[str, bytes | memoryview]) -> bytes:
    """Return the blob that holds `files`; see `pieces`."""
    return b"".join(pieces(files))


def pieces(files: Mapping[str, bytes | memoryview]) -> list[bytes | memoryview]:
    """Return the parts of the blob that holds `files`, in order; equal input gives equal bytes.

    Args:
        files: relative POSIX path to content.

    Returns:
        The contents themselves and what lies between them. Joined, they are a blob that `unpack`
        and ExecuTorch's Core ML runtime read.

    Raises:
        ArtifactError: a path is empty, absolute, leaves the folder, or is both file and folder.
    """
    tree: dict[str, Any] = {}
    for path in sorted(files):
        names = path.split("/")
        for part in names:
            _check_name(part)
        folder = tree
        for part in names[:-1]:
            folder = folder.setdefault(part, {})
            if not isinstance(folder, dict):
                raise ArtifactError(f"'{path}' needs a folder where '{part}' is a file.")
        if names[-1] in folder:
            raise ArtifactError(f"'{path}' is both a file and a folder.")
        folder[names[-1]] = memoryview(files[path]).cast("B")
    total = sum(memoryview(content).nbytes for content in files.values())
    alignment = _PAGE if total > _LARGE else 1
    nodes: list[dict[str, Any]] = []
    contents: list[bytes | memoryview] = []
    _append(tree, "lowered_module", alignment, nodes, contents, 0)
    index = json.dumps({"nodes": nodes}, separators=(",", ":"), ensure_ascii=False).encode()
    return [*contents, index[::-1]]


def _append(
    item: dict[str, Any] | memoryview,
    name: str,
    alignment: int,
    nodes: list[dict[str, Any]],
    parts: list[bytes | memoryview],
    position: int,
) -> int:
    """Append `item` in post-order and return the position after its last byte."""
    children: dict[str, int] = {}
    region = {"offset": 0, "size": 0}
    if isinstance(item, dict):
        for child in sorted(item):
            position = _append(item[child], child, alignment, nodes, parts, position)
            children[child] = len(nodes) - 1
    else:
        padding = -position % alignment
        region = {"offset": position + padding, "size": len(item)}
        parts += [bytes(padding), item]
        position += padding + len(item)
    kind = _FOLDER if isinstance(item, dict) else _FILE
    nodes.append({"children": children, "dataRegion": region, "kind": kind, "name": name})
    return position


def _index_text(data: memoryview) -> tuple[bytes, int]:
    """Return the index in reading order and its distance from the end of the data."""
    tail = bytes(data[-_MAX_INDEX:])[::-1]
    start = len(tail) - len(tail.lstrip(b"\0"))
    if start > _MAX_SLACK or tail[start : start + 1] != b"{":
        raise ArtifactError(
            "The delegate's data does not end in the index of a Core ML blob; "
            "it is truncated, or another program wrote it."
        )
    depth = 0
    for token in _TOKEN.finditer(tail, start):
        if token.group() == b"{":
            depth += 1
        elif token.group() == b"}":
            depth -= 1
        if depth == 0:
            return tail[start : token.end()], token.end()
    raise ArtifactError("The index of the Core ML blob has no end; the blob is damaged.")


def _parse(text: bytes) -> list[_Node]:
    try:
        decoded = json.loads(text, object_pairs_hook=_unique)
        nodes = [_node(item) for item in decoded["nodes"]]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ArtifactError(
            f"The index of the Core ML blob is damaged ({type(error).__name__}: {error})."
        ) from error
    if not nodes:
        raise ArtifactError("The index of the Core ML blob lists nothing.")
    for number, node in enumerate(nodes):
        for name, child in node.children:
            # Post-order: whatever a folder holds comes before it, which also rules out cycles.
            if not 0 <= child < number:
                raise ArtifactError(
                    f"The Core ML blob's index gives '{name}' the node {child}; a child of node "
                    f"{number} must come before it."
                )
    return nodes


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key occurs twice")
    return result


def _node(item: dict[str, Any]) -> _Node:
    kind = _natural(item["kind"])
    if kind not in (_FILE, _FOLDER):
        raise ValueError(f"unknown kind of node {kind}")
    children = tuple((name, _natural(child)) for name, child in item["children"].items())
    for name, _ in children:
        _check_name(name)
    region = item["dataRegion"]
    return _Node(item["name"], kind, _natural(region["offset"]), _natural(region["size"]), children)


def _natural(value: object) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is no natural number")
    return value


def _check_name(name: str) -> None:
    if name in ("", ".", "..") or "\0" in name or "\\" in name or PurePosixPath(name).name != name:
        raise ArtifactError(f"A Core ML blob must not hold an item named {name!r}.")
