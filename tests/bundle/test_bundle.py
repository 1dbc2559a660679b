"""The output folder: whole or not there at all, and read back only when it is what it says."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import jsonschema
import pytest

from llm_coreml.bundle.card import model_card
from llm_coreml.bundle.folder import (
    MANIFEST,
    PROGRAM,
    check_output,
    may_be_bundle,
    new_bundle,
    open_bundle,
    program_at,
)
from llm_coreml.bundle.manifest import Manifest, manifest_schema
from llm_coreml.bundle.record import (
    make_manifest,
    public_config,
    public_name,
    rebuild_command,
)
from llm_coreml.bundle.seal import file_sha256, sealed
from llm_coreml.checkpoint import Source
from llm_coreml.config import ExportConfig, resolve
from llm_coreml.config.setting import settings_of
from llm_coreml.errors import ArtifactError, ConfigError, OutputError
from llm_coreml.lower.forms import form_for
from llm_coreml.model import open_model
from llm_coreml.output import write_json
from llm_coreml.pipeline import export
from llm_coreml.progress import Silent
from llm_coreml.quantize.quantized import quantize
from llm_coreml.verify.verification import Conversion, Verification
from tiny import llama

CONVERSION = Conversion(21, 60, 2e-7, 3e-5)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The manifest of an export whose program is a stand-in."""
    program = tmp_path_factory.mktemp("program") / PROGRAM
    program.write_bytes(b"program")
    model = open_model(llama(intermediate_size=96, tie_word_embeddings=True))
    config = ExportConfig(context=32, seq_lengths=(1, 8))
    job = resolve(config, model.spec)
    quantized = quantize(model, job, program.with_name("no tokenizer"), Silent())
    made = make_manifest(
        quantized,
        form_for(job, model.spec, None, ()).description,
        program,
        Verification("reference runtime", "held-out text", 64, 63, 40, 1e-3, 1e-6, CONVERSION),
    )
    return sealed(made, program.parent).to_json()


@pytest.fixture
def bundle(manifest: dict[str, Any], tmp_path: Path) -> Path:
    """A folder as an export leaves it."""
    folder = tmp_path / "bundle"
    folder.mkdir()
    (folder / PROGRAM).write_bytes(b"program")
    write_json(folder / MANIFEST, manifest)
    return folder


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# Reading


def test_a_manifest_fits_its_schema_and_is_read_back(
    bundle: Path, manifest: dict[str, Any]
) -> None:
    jsonschema.Draft202012Validator.check_schema(manifest_schema())
    jsonschema.validate(manifest, manifest_schema())
    opened = open_bundle(bundle)
    assert opened.manifest.to_json() == json.loads(json.dumps(manifest))
    assert opened.program == bundle / PROGRAM
    assert opened.manifest.program.sha256 == file_sha256(opened.program)
    assert opened.manifest.program.bytes == 7
    assert entries(bundle) == [MANIFEST, PROGRAM], "no draft of the manifest is left"


def test_bytes_of_the_groups_add_up(manifest: dict[str, Any]) -> None:
    described = manifest["quantization"]
    assert described["lm_head"]["bytes"] == 0, "a tied head is stored with the table"
    linear = 64 * 64 * 2 + 32 * 64 * 2 + 3 * 64 * 96
    assert described["linear"]["bytes"] == linear * 4.5 / 8
    assert described["linear"]["matrices"] == 7
    assert described["embedding"]["bytes"] == 97 * 64 + 97 * 2


def test_the_card_tells_what_the_manifest_holds(manifest: dict[str, Any]) -> None:
    card = model_card(Manifest.from_json(manifest), chat=False)
    for part in ("int4 group 32", "1.00e-03", "No Apple device took part", "float32 [1, 1, 97]"):
        assert part in card
    assert "all 21 weights and tables" in card and "2.0e-07 (bound 3e-05)" in card
    assert "feeds up to 8 tokens in a call, of any number, which the method pads" in card
    constants = {**manifest["program"]["constant_methods"], "enable_dynamic_shape": False}
    alone = {**manifest, "program": {**manifest["program"], "constant_methods": constants}}
    assert "| prompts | fed token by token" in model_card(Manifest.from_json(alone), False)
    shape = "[1, 2, 64, 16]"
    assert f"`cache_keys` float16 {shape}, `cache_values` float16 {shape}" in card
    assert "no multiple of 32" not in card
    engine = {**manifest, "target": {**manifest["target"], "name": "ane"}}
    assert "is no multiple of 32 (coremltools issue 2631) |" in model_card(
        Manifest.from_json(engine), chat=False
    )
    forgetting = {**manifest, "program": {**manifest["program"], "states": {}}}
    told = model_card(Manifest.from_json(forgetting), chat=False)
    assert "32 positions; nothing is remembered between calls" in told
    checked = {**manifest["verification"], "conversion": None}
    unrounded = Manifest.from_json({**manifest, "verification": checked})
    assert "without rounding" not in model_card(unrounded, chat=False)
    assert " ".join(manifest["rebuild"]) in card


def test_the_title_of_a_card_is_no_path(manifest: dict[str, Any]) -> None:
    folder = {**manifest["source"], "kind": "folder", "name": "/home/somebody/my-finetune"}
    assert "\n# my-finetune for ExecuTorch" in model_card(
        Manifest.from_json({**manifest, "source": folder}), chat=False
    )
    hub = {**folder, "kind": "hub", "name": "org/name"}
    assert "\n# org/name for ExecuTorch" in model_card(
        Manifest.from_json({**manifest, "source": hub}), chat=False
    )


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda m: m.pop("source"), "is damaged at $: 'source' is a required property"),
        (lambda m: m.update(extra=1), "is damaged at $: Additional properties"),
        (lambda m: m["source"].update(sha256="0"), "is damaged at $.source.sha256"),
        (lambda m: m["source"].update(kind="ftp"), "is damaged at $.source.kind"),
        (lambda m: m["program"].update(bytes=0), "is damaged at $.program.bytes"),
        (lambda m: m["program"].update(file="../x"), "is damaged at $.program.file"),
        (lambda m: m["program"].update(seq_lengths=[]), "is damaged at $.program.seq_lengths"),
        (lambda m: m["program"].update(seq_lengths=[0]), "at $.program.seq_lengths[0]"),
        (lambda m: m["quantization"].pop("tied"), "is damaged at $.quantization"),
        (lambda m: m["quantization"].update(linear={}), "is damaged at $.quantization.linear"),
        (lambda m: m["verification"].pop("rows"), "is damaged at $.verification"),
        (lambda m: m["verification"]["conversion"].pop("rows"), "at $.verification.conversion"),
        (lambda m: m.update(version=4), "has version 4; this release reads versions 1, 2 and 3"),
        (lambda m: m.pop("version"), "has version None; this release reads versions 1, 2 and 3"),
    ],
)
def test_a_damaged_manifest_is_refused(
    bundle: Path, manifest: dict[str, Any], change: Callable[[dict[str, Any]], Any], part: str
) -> None:
    damaged = json.loads(json.dumps(manifest))
    change(damaged)
    (bundle / MANIFEST).write_text(json.dumps(damaged))
    with pytest.raises(ArtifactError) as caught:
        open_bundle(bundle)
    assert part in str(caught.value)


@pytest.mark.parametrize(
    ("data", "part"),
    [
        (b"", "cannot be read"),
        (b'{"version": 2', "cannot be read"),
        (b"\xff\xfe\x00", "cannot be read"),
        (b"[1]", "has version None"),
        (b"null", "has version None"),
        (b'"text"', "has version None"),
    ],
)
def test_a_manifest_that_is_none_is_refused(bundle: Path, data: bytes, part: str) -> None:
    (bundle / MANIFEST).write_bytes(data)
    with pytest.raises(ArtifactError) as caught:
        open_bundle(bundle)
    assert part in str(caught.value)


def test_folders_that_are_no_bundle(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="is no bundle; give the folder that an export wrote"):
        open_bundle(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArtifactError, match=r"holds no manifest\.json"):
        open_bundle(tmp_path / "empty")
    (bundle / "other.pte").write_bytes(b"x")
    with pytest.raises(ArtifactError, match=r"other\.pte' is no bundle"):
        open_bundle(bundle / "other.pte")
    assert open_bundle(bundle / PROGRAM).folder == bundle
    (bundle / PROGRAM).unlink()
    with pytest.raises(ArtifactError, match=r"holds no model\.pte; export again"):
        open_bundle(bundle)


# Where an output may go


def test_an_output_that_exists_is_left_alone(bundle: Path) -> None:
    with pytest.raises(OutputError, match="exists already; give another -o, or --overwrite"):
        check_output(bundle, overwrite=False)
    check_output(bundle, overwrite=True)


def test_overwrite_replaces_exports_only(tmp_path: Path, bundle: Path) -> None:
    foreign = tmp_path / "photos"
    foreign.mkdir()
    check_output(foreign, overwrite=True)
    (foreign / "manifest.json").write_text("{}")
    with pytest.raises(OutputError, match=r"'manifest\.json', which no export wrote"):
        check_output(foreign, overwrite=True)
    with pytest.raises(OutputError, match="which no export wrote, so --overwrite leaves"):
        check_output(foreign / "manifest.json", overwrite=True)
    check_output(bundle, overwrite=True)
    (bundle / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"'notes\.txt', which no export wrote"):
        check_output(bundle, overwrite=True)


def own(folder: Path, name: str) -> None:
    """Put somebody's work where an export has a file of that name."""
    path = folder / name
    if path.exists():
        path.unlink()
    path.mkdir()
    (path / "thesis.txt").write_text("years of work")


FOREIGN: dict[str, tuple[Callable[[Path], object], str]] = {
    "a program alone": (lambda f: (f / MANIFEST).unlink(), "model.pte"),
    "another program": (lambda f: (f / PROGRAM).write_bytes(b"PROGRAM"), "model.pte"),
    "another manifest": (lambda f: (f / MANIFEST).write_text("[1]"), "manifest.json"),
    "a card that is not listed": (lambda f: (f / "README.md").write_text("# Mine"), "README.md"),
    "a tokenizer that is not listed": (
        lambda f: (f / "tokenizer.json").write_text("{}"),
        "tokenizer.json",
    ),
    "results of others": (lambda f: (f / "results.json").write_text('{"a": 1}'), "results.json"),
    "a folder as card": (lambda f: own(f, "README.md"), "README.md"),
    "a folder as program": (lambda f: own(f, PROGRAM), "model.pte"),
    "a folder as results": (lambda f: own(f, "results.json"), "results.json"),
    "a hidden file": (lambda f: (f / ".notes").touch(), ".notes"),
    "a link as card": (lambda f: (f / "README.md").symlink_to("/etc/passwd"), "README.md"),
}


@pytest.mark.parametrize("change", FOREIGN)
def test_only_what_a_manifest_lists_is_replaced(change: str, bundle: Path) -> None:
    make, name = FOREIGN[change]
    make(bundle)
    before = {path: path.read_bytes() for path in bundle.rglob("*") if path.is_file()}
    with pytest.raises(OutputError, match=rf"'{re.escape(name)}'.*, which no export wrote"):
        check_output(bundle, overwrite=True)
    with pytest.raises(OutputError), new_bundle(bundle, overwrite=True):
        pytest.fail("the block must not run")
    assert {path: path.read_bytes() for path in bundle.rglob("*") if path.is_file()} == before


def test_a_listed_card_may_have_been_edited_and_results_added(
    bundle: Path, manifest: dict[str, Any]
) -> None:
    (bundle / "README.md").write_text("# Ours")
    listed = {**manifest, "files": {"README.md": {"bytes": 6, "sha256": "0" * 64}}}
    write_json(bundle / MANIFEST, listed)
    (bundle / "README.md").write_text("# Ours, edited")
    (bundle / "results.json").write_text('{"program_sha256": "0"}')
    (bundle / ".llm-coreml-0").touch()  # an evaluation was killed
    check_output(bundle, overwrite=True)
    assert entries(bundle) == ["README.md", MANIFEST, PROGRAM, "results.json"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_places_that_cannot_be(
    overwrite: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "pool")
    (tmp_path / "pool").symlink_to(tmp_path / "loop")
    (tmp_path / "nothing").symlink_to(tmp_path / "absent")
    monkeypatch.chdir(tmp_path)
    before = entries(tmp_path)
    for name in (
        *("loop", "loop/out", "pool/a/b", "nothing", "x" * 256, "x/" * 3000, "x" * 256 + "/out"),
        *("~nobody-at-all/out", "~nobody-at-all", b"\xff".decode("utf-8", "surrogateescape"), "."),
    ):
        with pytest.raises(OutputError) as caught, new_bundle(Path(name), overwrite):
            pytest.fail(name)
        assert str(caught.value).isprintable()
        assert "ive another" in str(caught.value) or "whole path" in str(caught.value)
    assert entries(tmp_path) == before


def test_a_folder_that_nobody_may_look_into(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stat = Path.stat

    # Root may look everywhere, so the system's answer is given here.
    def refuse(path: Path, **settings: Any) -> os.stat_result:
        if "closed" in path.parts[:-1]:
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, **settings)

    monkeypatch.setattr(Path, "stat", refuse)
    with pytest.raises(OutputError, match=r"out' cannot be written: Permission denied"):
        check_output(tmp_path / "closed" / "out", overwrite=False)


def test_a_failed_swap_puts_the_earlier_export_back(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (bundle / PROGRAM).read_bytes()
    rename = Path.rename

    def interrupted(self: Path, target: Path) -> Path:
        if target == bundle:
            monkeypatch.undo()
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt), new_bundle(bundle, overwrite=True) as draft:
        (draft / PROGRAM).write_bytes(b"new")
    assert (bundle / PROGRAM).read_bytes() == before
    assert entries(bundle.parent) == [bundle.name]


def test_what_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    output = tmp_path / "deep" / "out"
    with pytest.raises(OutputError, match="exists already"), new_bundle(output, overwrite=False):
        output.mkdir()
        (output / "thesis.txt").write_text("years of work")
    assert (output / "thesis.txt").read_text() == "years of work"


def test_folders_made_on_the_way_go_with_the_draft(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), new_bundle(tmp_path / "p" / "q" / "r", False):
        raise KeyboardInterrupt
    assert entries(tmp_path) == []


def test_a_file_as_parent_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for output in (tmp_path / "file" / "out", tmp_path / "file" / "deep" / "out"):
        with pytest.raises(OutputError, match="file' cannot be written to; give another -o"):
            check_output(output, overwrite=False)


def test_a_place_that_takes_no_folders_is_refused() -> None:
    """Root passes every permission check, but nobody makes a folder in /proc."""
    output = Path("/proc/out")
    with pytest.raises(OutputError, match="/proc"), new_bundle(output, overwrite=False):
        pytest.fail("the block must not run")


def test_a_read_only_parent_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Root may write anywhere, so the system's answer is given here.
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(OutputError, match="cannot be written to; give another -o"):
        check_output(tmp_path / "out", overwrite=False)


# Writing


def test_a_good_end_leaves_the_bundle_alone(tmp_path: Path) -> None:
    output = tmp_path / "deep" / "out"
    before = tempfile.gettempdir()
    with new_bundle(output, overwrite=False) as draft:
        assert not output.exists()
        (draft / PROGRAM).write_bytes(b"program")
        assert Path(tempfile.gettempdir()).is_relative_to(output.parent), "and it goes too"
        Path(tempfile.mkdtemp(), "leftover").write_text("x")
    assert tempfile.gettempdir() == before
    assert entries(tmp_path / "deep") == ["out"]
    assert entries(output) == [PROGRAM]
    assert output.stat().st_mode & 0o777 == 0o755


def test_overwrite_swaps_the_folder_whole(bundle: Path) -> None:
    (bundle / "results.json").write_text('{"program_sha256": "0"}')
    with new_bundle(bundle, overwrite=True) as draft:
        (draft / PROGRAM).write_bytes(b"new")
        assert (bundle / PROGRAM).read_bytes() == b"program", "the old one stays until the end"
    assert entries(bundle) == [PROGRAM]
    assert entries(bundle.parent) == ["bundle"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("bug"), RuntimeError("C++")])
@pytest.mark.parametrize("overwrite", [False, True])
def test_nothing_is_left_after_an_error(
    error: BaseException, overwrite: bool, bundle: Path
) -> None:
    output = bundle if overwrite else bundle.parent / "out"
    before = tempfile.gettempdir()
    with pytest.raises(type(error)) as caught, new_bundle(output, overwrite) as draft:
        (draft / PROGRAM).write_bytes(b"half")
        raise error
    assert caught.value is error
    assert tempfile.gettempdir() == before
    assert entries(bundle.parent) == ["bundle"]
    assert (bundle / PROGRAM).read_bytes() == b"program"


def test_a_failed_export_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="longer than the 64 positions"):
        export(llama(intermediate_size=96), output=tmp_path / "out", context=128)
    assert entries(tmp_path) == []


def test_an_export_refuses_its_output_before_it_opens_the_model(bundle: Path) -> None:
    with pytest.raises(OutputError, match="exists already"):
        export("no/such-model", output=bundle)


# A full disk

_FILL = """
import sys
from pathlib import Path
from llm_coreml.bundle.folder import new_bundle
from llm_coreml.errors import OutputError
from llm_coreml.output import write_json

way, output, cap = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
if cap:
    import resource, signal
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (cap, cap))
try:
    with new_bundle(output, overwrite=False) as draft:
        if way == "json":
            write_json(draft / "manifest.json", {"text": "x" * 4_000_000})
        elif way == "torch":
            import torch
            torch.save(torch.zeros(1_000_000), draft / "model.pte")
        else:
            (draft / "model.pte").write_bytes(bytes(4_000_000))
except OutputError as error:
    print(error)
    sys.exit(error.exit_code)
"""


def fill(way: str, output: Path, cap: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", _FILL, way, str(output), str(cap)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[int]:
    """Make `folder` a disk of 1 MiB where this process may mount one.

    Yields:
        0, or where no disk can be mounted the file size that stands in for it.
    """
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True).returncode == 0
    except FileNotFoundError:
        mounted = False
    try:
        yield 0 if mounted else 1 << 20
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("way", ["bytes", "json"])
@pytest.mark.parametrize("disk", ["mounted where allowed", "limited"])
def test_a_full_disk_is_told_and_left_as_it_was(way: str, disk: str, tmp_path: Path) -> None:
    folder = tmp_path / "disk"
    with small_disk(folder) if disk != "limited" else contextlib.nullcontext(1 << 20) as cap:
        folder.mkdir(exist_ok=True)
        done = fill(way, folder / "out", cap)
        assert done.returncode == OutputError.exit_code, done.stderr
        assert "is full; free some space or give another -o. Nothing was written." in done.stdout
        assert entries(folder) == []


def test_a_library_that_fails_on_a_full_disk_is_told_so(tmp_path: Path) -> None:
    """torch reports a full disk as a RuntimeError; new_bundle then tries to write itself."""
    with small_disk(tmp_path / "disk") as cap:
        done = fill("torch", tmp_path / "disk" / "out", min(cap, 1 << 19))
        assert done.returncode == OutputError.exit_code, done.stderr
        assert "is full" in done.stdout
        assert entries(tmp_path / "disk") == []


def test_a_library_that_fails_where_there_is_space_fails_with_its_own_words(tmp_path: Path) -> None:
    done = fill("torch", tmp_path / "out", 1 << 20)
    assert done.returncode == 1 and "RuntimeError" in done.stderr
    assert entries(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("/home/somebody/secret/my-finetune", "my-finetune"),
        ("./secret/my-finetune", "my-finetune"),
        ("secret/checkpoints/last", "last"),
        ("org/name", "org/name"),
        ("LlamaForCausalLM", "LlamaForCausalLM"),
    ],
)
def test_a_live_model_does_not_tell_where_it_was_loaded_from(name: str, told: str) -> None:
    assert public_name(Source("live", name)) == told


@pytest.mark.parametrize(
    ("kind", "name", "told"),
    [
        ("folder", "/home/somebody/secret/my-finetune", "my-finetune"),
        ("folder", "../my-finetune/", "my-finetune"),
        ("folder", "models/file-Q4_0.gguf", "file-Q4_0.gguf"),
        ("hub", "org/name", "org/name"),
        ("bundled", "llama", "llama"),
    ],
)
def test_no_path_of_the_exporter_s_machine_is_told(
    kind: Literal["folder", "hub", "bundled"], name: str, told: str
) -> None:
    source = Source(kind, name)
    assert public_name(source) == told
    words = rebuild_command(source, ExportConfig())
    assert words[2] == (f"./{told}" if kind == "folder" else told)
    assert "somebody" not in " ".join(words)


def test_a_bundle_tells_of_files_their_names_alone() -> None:
    paths = [each.name for each in settings_of(ExportConfig) if "FILE" in (each.metavar or "")]
    assert paths, "settings that are files"
    for name in paths:
        told = public_config(replace(ExportConfig(), **{name: "/home/somebody/secret/file.txt"}))
        assert getattr(told, name) == "file.txt", name
        assert "somebody" not in json.dumps(told.to_json())
    assert public_config(ExportConfig(calibrate="bundled")) == ExportConfig(calibrate="bundled")
    config = ExportConfig(calibrate="../secret/notes.txt", bits=3)
    words = rebuild_command(Source("hub", "org/name"), config)
    assert words[-2:] == ["--calibrate", "notes.txt"]


@pytest.mark.parametrize("name", [300 * "n", "a\0b"])
def test_names_that_no_file_can_have_are_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    for opened in (open_bundle, program_at, may_be_bundle):
        with pytest.raises(
            ArtifactError, match=r"cannot be read|is no name of a file|is no bundle"
        ):
            opened(path)
    with pytest.raises(OutputError):
        check_output(path, overwrite=False)
    for setting in ("calibrate", "plan"):
        if "\0" in name:
            with pytest.raises(ConfigError, match="no name holds a NUL"):
                ExportConfig(**{setting: name})  # type: ignore[arg-type]
