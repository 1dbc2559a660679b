"""A program of more than a gibibyte: mapped, not read. The file is sparse, so no disk is needed."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from llm_coreml.artifact import pte
from llm_coreml.artifact.inmemoryfs import unpack

SIZE = (1 << 30) + (1 << 26)
PAGE = 16384

RUN = """
import resource, sys, time
import torch
from llm_coreml.reference import load_method
from llm_coreml.artifact import pte
from llm_coreml.artifact.inmemoryfs import unpack

load_method(sys.argv[1])
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
before, start = peak(), time.monotonic()
(delegate,) = pte.read_delegates(sys.argv[2])
assert len(delegate.data) > 1 << 30
assert sum(map(len, unpack(delegate.data).values())) > 1 << 30
method = load_method(sys.argv[2])
x = torch.tensor([-3.0, 1.5])
assert torch.equal(method(x), load_method(sys.argv[1])(x))
assert peak() - before < 128, f"{peak() - before} MiB more"
assert time.monotonic() - start < 20
"""


@pytest.fixture
def large_pte(segmented_pte: Path, tmp_path: Path) -> Path:
    """`segmented_pte` with a huge file of zeros beside the model, aligned as ExecuTorch does."""
    content = segmented_pte.read_bytes()
    (delegate,) = pte.read_delegates(segmented_pte)
    _, base = struct.unpack_from("<QQ", content, 16)
    path = tmp_path / "large.pte"
    nodes, children, at = [], {}, 0
    files = {**unpack(delegate.data), "zeros.bin": memoryview(b"")}
    with path.open("wb") as file:
        for number, (name, data) in enumerate(files.items()):
            size = len(data) or SIZE
            nodes.append(node(name, 0, {}, at, size))
            children[name] = number
            file.seek(base + at)
            file.write(data)
            at += size + -size % PAGE
        add_folders(nodes, children)
        # The writer that ExecuTorch uses leaves a few zeros behind the index of a large folder.
        file.seek(base + at)
        blob_size = at + len(index(nodes)) + 33
        file.write(index(nodes)[::-1] + bytes(33))
        program = content[:base].replace(
            struct.pack("<Q", len(delegate.data)), struct.pack("<Q", blob_size)
        )
        assert program.count(struct.pack("<Q", blob_size)) == 2
        file.seek(0)
        file.write(program)
    assert path.stat().st_size == base + blob_size
    return path


def node(name: str, kind: int, children: dict[str, int], at: int, size: int) -> dict[str, object]:
    region = {"offset": at, "size": size}
    return {"children": children, "dataRegion": region, "kind": kind, "name": name}


def add_folders(nodes: list[dict[str, object]], files: dict[str, int]) -> None:
    """Append the folders that hold `files`, innermost first."""
    tree: dict[str, dict[str, int]] = {"": {}}
    for path, number in files.items():
        parents = path.split("/")[:-1]
        for depth in range(len(parents)):
            tree.setdefault("/".join(parents[: depth + 1]), {})
        tree["/".join(parents)][path.split("/")[-1]] = number
    for folder in sorted(tree, key=lambda folder: (-folder.count("/"), -len(folder))):
        nodes.append(node(folder, 1, tree[folder], 0, 0))
        if folder:
            parent, _, name = folder.rpartition("/")
            tree[parent][name] = len(nodes) - 1


def index(nodes: list[dict[str, object]]) -> bytes:
    return json.dumps({"nodes": nodes}).encode()


def test_large_program_is_mapped(large_pte: Path, segmented_pte: Path) -> None:
    command = [sys.executable, "-c", RUN, str(segmented_pte), str(large_pte)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    # Sparse, so this test takes no gibibyte of anybody's disk either.
    assert large_pte.stat().st_blocks * 512 < 1 << 24
