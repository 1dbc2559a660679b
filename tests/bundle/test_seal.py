"""A bundle is opened as it was written, by every command, or not at all."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from exported import Run, in_process, manifest_of, write_manifest
from llm_coreml.bundle import seal
from llm_coreml.bundle.folder import MANIFEST, PROGRAM, open_bundle
from llm_coreml.bundle.language_model import load
from llm_coreml.bundle.seal import checksum, file_sha256
from llm_coreml.errors import ArtifactError
from llm_coreml.eval.reading import open_artifact
from llm_coreml.inspect.contents import contents

# Words after the bundle that make each command do little.
COMMANDS: dict[str, tuple[str, ...]] = {
    "generate": ("-p", "The", "--max-new-tokens", "1"),
    "inspect": ("--numerics", "--tokens", "2", "--against", "none"),
    "diff": ("--tokens", "2"),
    "extract": ("--overwrite",),
    "eval": ("--artifact-only", "--tokens", "2"),
    "run": (),
    "show": (),
}


@pytest.fixture
def own_bundle(bundle: Path, tmp_path: Path) -> Path:
    """A copy that a test may write to."""
    return Path(shutil.copytree(bundle, tmp_path / "own"))


def change_weight(folder: Path) -> None:
    """Change a byte of a weight, so that the program runs as well as before."""
    path = folder / PROGRAM
    content = bytearray(path.read_bytes())
    # Behind the metadata of the last blob of weight.bin.
    content[content.rindex(struct.pack("<I", 0xDEADBEEF)) + 64 + 5] ^= 1
    path.write_bytes(content)


def change_tokenizer(folder: Path) -> None:
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace('"add_prefix_space":', '"add_prefix_space" :', 1))


def opened(command: str, bundle: Path, original: Path) -> tuple[str | Path, ...]:
    """Return the words of a command that reads `bundle`."""
    other = (original,) if command == "diff" else ()
    place = ("-o", bundle.parent / "models") if command == "extract" else ()
    return (command, bundle, *other, *place, *COMMANDS[command])


Call = Callable[..., Run]


@pytest.fixture
def call(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Call:
    return lambda *words: in_process(capfd, monkeypatch, *words)


@pytest.mark.parametrize("command", COMMANDS)
def test_another_program_is_refused_by_every_command_and_opened_by_a_flag(
    call: Call, own_bundle: Path, bundle: Path, command: str
) -> None:
    words = opened(command, own_bundle, bundle)
    assert call(*words).code == 0
    change_weight(own_bundle)
    refused = call(*words)
    assert refused.code == ArtifactError.exit_code and refused.out == ""
    assert f"'{own_bundle / PROGRAM}' is not the file that its manifest" in refused.err
    assert "SHA-256" in refused.err and "--unchecked" in refused.err
    shown = call(*words, "--unchecked")
    assert shown.code == 0, shown.err
    if command == "eval":
        results = json.loads((own_bundle / "results.json").read_text())
        assert results["program_sha256"] == file_sha256(own_bundle / PROGRAM)


@pytest.mark.parametrize("command", ["show", "run", "inspect"])
def test_a_program_that_is_named_itself_is_its_bundles(
    call: Call, own_bundle: Path, command: str
) -> None:
    change_weight(own_bundle)
    words = (command, own_bundle / PROGRAM, *COMMANDS[command])
    assert call(*words).code == ArtifactError.exit_code
    alone = own_bundle.parent / "alone.pte"
    (own_bundle / PROGRAM).rename(alone)
    assert call("show", alone).code == 0, "nothing describes it"


EDITS: dict[str, Callable[[dict[str, Any]], object]] = {
    "context": lambda m: m["program"].update(context=128),
    "lengths": lambda m: m["program"].update(seq_lengths=[1, 4]),
    "eos": lambda m: m["program"]["constant_methods"].update(get_eos_ids=[2]),
    "bits": lambda m: m["quantization"]["linear"].update(bits=8),
    "error": lambda m: m["verification"].update(max_relative_error=0.0),
    "source": lambda m: m["source"].update(name="better"),
    "no list": lambda m: m["files"].pop("tokenizer.json"),
}


@pytest.mark.parametrize("name", EDITS)
def test_an_edited_manifest_is_refused(own_bundle: Path, name: str) -> None:
    manifest = manifest_of(own_bundle)
    EDITS[name](manifest)
    (own_bundle / MANIFEST).write_text(json.dumps(manifest))
    for call in (open_bundle, load, open_artifact, contents):
        with pytest.raises(ArtifactError, match=r"manifest\.json' has been changed since .*--unch"):
            call(own_bundle)
    # The program tells itself what it is.
    assert load(own_bundle, checked=False).runner.context == 64
    assert open_artifact(own_bundle, checked=False).runner.seq_lengths == (1, 8)


@pytest.mark.parametrize("version", [1, 2, 3])
@pytest.mark.parametrize(("name", "told"), [("context", "context"), ("eos", "get_eos_ids is 1")])
def test_a_manifest_whose_checksum_fits_is_held_against_the_program(
    own_bundle: Path, version: int, name: str, told: str
) -> None:
    manifest = manifest_of(own_bundle)
    EDITS[name](manifest)
    if version < 3:
        del manifest["files"], manifest["checksum"]
    write_manifest(own_bundle, {**manifest, "version": version})
    with pytest.raises(ArtifactError, match=f"not what the manifest describes.*{told}"):
        load(own_bundle)
    if name == "eos":
        with pytest.raises(ArtifactError, match=told):
            contents(own_bundle)


def test_layout_and_order_of_a_manifest_are_free(own_bundle: Path) -> None:
    manifest = manifest_of(own_bundle)
    turned = dict(reversed(manifest.items()))
    (own_bundle / MANIFEST).write_text(json.dumps(turned, separators=(",", ":")))
    assert open_bundle(own_bundle).manifest.checksum == checksum(turned)


def test_every_file_is_listed_and_held_to_the_list(own_bundle: Path) -> None:
    names = {path.name for path in own_bundle.iterdir()}
    listed = manifest_of(own_bundle)["files"]
    assert set(listed) == names - {MANIFEST, PROGRAM, "results.json"}
    change_tokenizer(own_bundle)
    with pytest.raises(ArtifactError, match=r"tokenizer\.json' is not the file .* bytes, not"):
        load(own_bundle)
    assert load(own_bundle, checked=False).encode("The")
    (own_bundle / "tokenizer.json").unlink()
    with pytest.raises(ArtifactError, match=r"tokenizer\.json' is missing, which its manifest"):
        open_bundle(own_bundle)


@pytest.mark.parametrize("name", [PROGRAM, "tokenizer.json", MANIFEST])
def test_a_bundle_that_was_cloned_without_its_files_is_told_so(own_bundle: Path, name: str) -> None:
    pointer = (
        "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935\nsize 9085657\n"
    )
    (own_bundle / name).write_text(pointer)
    with pytest.raises(ArtifactError, match=rf"{name} is a Git-LFS pointer.*git lfs pull"):
        open_bundle(own_bundle)


def test_the_card_may_be_edited(own_bundle: Path) -> None:
    (own_bundle / "README.md").write_text("# Mine\n")
    (own_bundle / "results.json").write_text("{}")
    (own_bundle / "notes.txt").write_text("mine")
    assert open_bundle(own_bundle).checked


def test_a_file_is_read_once_while_it_stays_as_it_is(
    own_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    original = seal._read_sha256
    monkeypatch.setattr(seal, "_read_sha256", lambda p: (read.append(p.name), original(p))[1])
    # What was written within the last second may be written again unnoticed.
    open_bundle(own_bundle), open_bundle(own_bundle)
    assert read.count(PROGRAM) == 2
    monkeypatch.setattr(seal, "_SETTLED_NS", 0)
    for _ in range(3):
        open_bundle(own_bundle)
    assert read.count(PROGRAM) == 3
    kept = (own_bundle / PROGRAM).stat()
    change_weight(own_bundle)
    os.utime(own_bundle / PROGRAM, ns=(kept.st_atime_ns, kept.st_mtime_ns))
    with pytest.raises(ArtifactError, match="SHA-256"):
        open_bundle(own_bundle)
