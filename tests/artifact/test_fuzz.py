"""Mutated containers: a program loads and runs, or an error says why not; nothing else happens.

    LLM_COREML_FUZZ_EXAMPLES=100000 pytest tests/artifact/test_fuzz.py

runs longer, and from another seed each time.
"""

from __future__ import annotations

import json
import os
import random
import struct
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from coremltools.proto import Model_pb2
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from artifacts import Artifact
from llm_coreml.artifact import pte
from llm_coreml.artifact.inmemoryfs import pack, unpack
from llm_coreml.errors import LlmCoreMLError
from llm_coreml.inspect.contents import contents
from llm_coreml.reference import load_method

EXAMPLES = int(os.environ.get("LLM_COREML_FUZZ_EXAMPLES", "0"))
NUMBERS = (0, 1, 2, 3, 7, 63, 255, 1 << 15, (1 << 31) - 1, 1 << 31, (1 << 63) - 1, (1 << 64) - 1)
MODEL = "model.mlpackage/Data/com.apple.CoreML/model.mlmodel"


def fuzzed(examples: int) -> settings:
    return settings(
        max_examples=EXAMPLES or examples,
        derandomize=not EXAMPLES,
        database=None,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


seeds = st.integers(0, (1 << 32) - 1)


def attempt(path: Path) -> bool:
    """Load and run the method at `path`; return whether it ran."""
    start = time.monotonic()
    try:
        contents(path)
        method = load_method(path)
        arguments = [
            torch.ones(
                [1 if spec.dynamic else size for size in spec.shape],
                dtype=getattr(torch, spec.dtype),
            )
            for spec in method.inputs
        ]
        for _ in range(2):
            method.run(*arguments)
        method.reset()
    except LlmCoreMLError as error:
        assert str(error).isprintable()
        return False
    finally:
        assert time.monotonic() - start < 20
    return True


@fuzzed(120)
@given(seed=seeds)
@pytest.mark.parametrize("name", ["sample", "portable"])
def test_bytes(seed: int, name: str, sample_pte: Path, portable_pte: Path, tmp_path: Path) -> None:
    chance = random.Random(seed)
    content = bytearray({"sample": sample_pte, "portable": portable_pte}[name].read_bytes())
    # Weighted towards the start, where the tables are.
    end = chance.choice((200, 1000, 4000, len(content)))
    for _ in range(chance.randint(1, 5)):
        at = chance.randrange(min(end, len(content)) - 8)
        width = chance.choice("BHIQ")
        number = chance.choice((chance.getrandbits(64), chance.choice(NUMBERS)))
        number &= (1 << 8 * struct.calcsize(width)) - 1
        struct.pack_into(f"<{width}", content, at, number)
    if chance.random() < 0.1:
        del content[chance.randrange(len(content)) :]
    path = tmp_path / "mutated.pte"
    path.write_bytes(content)
    attempt(path)


def with_blob(content: bytes, old: bytes, blob: bytes) -> bytes:
    """Return a `.pte` whose last segment, `old`, is `blob`."""
    base, size = struct.unpack_from("<QQ", content, 24)
    first = content.rindex(old)
    head = content[:base]
    # The size of the segment and that of all of them, which are the same if there is one.
    for number, count in Counter((len(old), size)).items():
        assert head.count(struct.pack("<Q", number)) == count
        new = number - len(old) + len(blob)
        head = head.replace(struct.pack("<Q", number), struct.pack("<Q", new))
    return head + content[base:first] + blob


def fields(message: Any) -> Iterator[tuple[Any, Any, Any]]:
    """Yield every set field of a protobuf message and of those within: owner, field, value."""
    for field, value in message.ListFields():
        yield message, field, value
        if field.type != field.TYPE_MESSAGE:
            continue
        if field.message_type.GetOptions().map_entry:
            inner = [value[key] for key in value]
            parts = inner if inner and hasattr(inner[0], "ListFields") else []
        else:
            parts = list(value) if field.is_repeated else [value]
        for part in parts:
            yield from fields(part)


def mutate(message: Any, chance: random.Random, names: list[str]) -> None:
    """Change one field of a message."""
    owner, field, value = chance.choice(list(fields(message)))
    if field.type == field.TYPE_MESSAGE and field.message_type.GetOptions().map_entry:
        keys = list(value)
        del value[chance.choice(keys)]
    elif field.is_repeated:
        mutate_list(value, field, chance, names)
    elif field.type == field.TYPE_MESSAGE or chance.random() < 0.1:
        owner.ClearField(field.name)
    else:
        setattr(owner, field.name, scalar(field, chance, names))


def mutate_list(value: Any, field: Any, chance: random.Random, names: list[str]) -> None:
    at, how = chance.randrange(len(value)), chance.choice(("drop", "repeat", "set"))
    if how == "drop":
        del value[at]
    elif how == "repeat":
        value.extend([value[at]] * chance.choice((1, 2, 30)))
    elif field.type != field.TYPE_MESSAGE:
        value[at] = scalar(field, chance, names)
    else:
        value[at].CopyFrom(value[chance.randrange(len(value))])


def scalar(field: Any, chance: random.Random, names: list[str]) -> Any:
    kind = field.cpp_type
    if kind == field.CPPTYPE_STRING:
        text = chance.choice(names)
        return text.encode() * 3 if field.type == field.TYPE_BYTES else text
    if kind in (field.CPPTYPE_FLOAT, field.CPPTYPE_DOUBLE):
        return chance.choice((0.0, -1.0, 1e30, float("inf"), float("nan")))
    if kind == field.CPPTYPE_BOOL:
        return chance.random() < 0.5
    if kind == field.CPPTYPE_ENUM:
        return chance.choice((0, 1, 2, 10, 11, 21, 23, 25, 31, 35, 99))
    bits = 31 if kind in (field.CPPTYPE_INT32, field.CPPTYPE_UINT32) else 63
    number = chance.choice(NUMBERS) & ((1 << bits) - 1)
    signed = kind in (field.CPPTYPE_INT32, field.CPPTYPE_INT64)
    return -number if signed and chance.random() < 0.3 else number


@fuzzed(25)
@given(seed=seeds)
@pytest.mark.parametrize("label", ["codebook-2", "int4-group-8"])
def test_models(
    seed: int, label: str, quantized: Callable[[str], Artifact], tmp_path: Path
) -> None:
    content = quantized(label).path.read_bytes()
    (delegate,) = pte.read_delegates(quantized(label).path)
    files = {name: bytes(data) for name, data in unpack(delegate.data).items()}
    chance, spec = random.Random(seed), Model_pb2.Model()
    spec.ParseFromString(files[MODEL])
    function = spec.mlProgram.functions["main"]
    operations = function.block_specializations[function.opset].operations
    names = [item.outputs[0].name for item in operations if item.outputs]
    names += [item.type for item in operations] + ["", "\n", "fp16", "int32", "@model_path/x"]
    for _ in range(chance.randint(1, 3)):
        # Mostly one operation; sometimes anything, such as the interface.
        anywhere = chance.random() < 0.2
        mutate(spec if anywhere else chance.choice(operations), chance, names)
    files[MODEL] = spec.SerializeToString()
    path = tmp_path / "mutated.pte"
    path.write_bytes(with_blob(content, bytes(delegate.data), pack(files)))
    attempt(path)


def mutated_json(value: Any, chance: random.Random) -> Any:
    """Return a JSON value with one part of it changed."""
    if chance.random() < 0.2 or not isinstance(value, (dict, list)) or not value:
        return chance.choice((None, -1, 0, 1, 1 << 70, 0.5, "", "..", "/x", [], {}, [0], {"a": 1}))
    key = chance.choice(list(value) if isinstance(value, dict) else range(len(value)))
    if chance.random() < 0.1:
        return type(value)()
    changed = value.copy()
    changed[key] = mutated_json(value[key], chance)
    return changed


def nodes(blob: bytes) -> list[dict[str, Any]]:
    """Return the index of a blob, which lies back to front at its end."""
    text = blob[::-1].lstrip(b"\0").decode("latin-1")
    found: list[dict[str, Any]] = json.JSONDecoder().raw_decode(text)[0]["nodes"]
    return found


@fuzzed(120)
@given(seed=seeds)
def test_folders(seed: int, segmented_pte: Path, tmp_path: Path) -> None:
    chance, content = random.Random(seed), segmented_pte.read_bytes()
    (delegate,) = pte.read_delegates(segmented_pte)
    files = {name: bytes(data) for name, data in unpack(delegate.data).items()}
    blob = bytes(delegate.data)
    if chance.random() < 0.5:
        # The index follows the last file, which ExecuTorch's writer packs densely, back to front.
        ends = [node["dataRegion"] for node in nodes(blob)]
        size = max(region["offset"] + region["size"] for region in ends)
        index = {"nodes": nodes(blob)}
        blob = blob[:size] + json.dumps(mutated_json(index, chance)).encode()[::-1]
    else:
        name = chance.choice(["metadata.json", "model.mlpackage/Manifest.json"])
        files[name] = json.dumps(mutated_json(json.loads(files[name]), chance)).encode()
        blob = pack(files)
    path = tmp_path / "mutated.pte"
    path.write_bytes(with_blob(content, bytes(delegate.data), blob))
    attempt(path)


def test_unmutated_programs_run(
    sample_pte: Path, portable_pte: Path, segmented_pte: Path, quantized: Any, tmp_path: Path
) -> None:
    for path in (sample_pte, portable_pte, segmented_pte, quantized("codebook-2").path):
        assert attempt(path)
    content = segmented_pte.read_bytes()
    (delegate,) = pte.read_delegates(segmented_pte)
    path = tmp_path / "same.pte"
    path.write_bytes(with_blob(content, bytes(delegate.data), pack(unpack(delegate.data))))
    assert attempt(path)
