"""Bad input through the command line: an exit code, a sentence that helps, and nothing left."""

from __future__ import annotations

import io
import json
import os
import resource
import shutil
import signal
import struct
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from exported import (
    SHAPES,
    TEXT,
    Run,
    files_of,
    in_process,
    manifest_of,
    run,
    write_manifest,
)
from llm_coreml.cli.stages import Stages
from llm_coreml.recipes import bundled_model

DOWN = "model.layers.0.mlp.down_proj.weight"
NORM = "model.norm.weight"

Command = Callable[..., Run]


@pytest.fixture
def refuse(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Command:
    """Run a command in an empty working folder and hold its refusal to the rules of all."""

    def command(code: int, *words: str | Path) -> Run:
        before = files_of(tmp_path)
        done = in_process(capfd, monkeypatch, *words)
        assert done.code == code, done.err
        assert done.out == ""
        assert "Traceback" not in done.err and "an unexpected" not in done.err
        assert files_of(tmp_path) == before
        return done

    monkeypatch.chdir(tmp_path)
    return command


def message(done: Run) -> str:
    """Return the message, which is the last line."""
    *_, line = done.err.splitlines()
    assert line.startswith("Error: ")
    return line.removeprefix("Error: ")


# The model


@pytest.fixture
def model(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may damage."""
    return Path(shutil.copytree(checkpoint, tmp_path / "model"))


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    path = folder / "model.safetensors"
    # Copies: the file is mapped, and is about to be written to.
    tensors = {name: value.clone() for name, value in load_file(path).items()}
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def poison(tensors: dict[str, torch.Tensor]) -> None:
    tensors[DOWN][3, 5] = float("nan")


def shard(folder: Path) -> None:
    """Split the weights in two files, and cut the end off the second."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[:3],
             "model-00002-of-00002.safetensors": names[3:]}  # fmt: skip
    for file, held in parts.items():
        save_file({name: tensors[name].clone() for name in held}, folder / file, {"format": "pt"})
    index = {"weight_map": {name: file for file, held in parts.items() for name in held}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()
    os.truncate(folder / "model-00002-of-00002.safetensors", 5000)


@pytest.mark.parametrize(
    ("damage", "code", "told"),
    [
        (lambda folder: (folder / "config.json").unlink(), 4, ("config.json",)),
        (
            lambda folder: (folder / "config.json").write_text("{"),
            4,
            ("config.json", "Download"),
        ),
        (lambda folder: (folder / "model.safetensors").unlink(), 4, ("safetensors",)),
        (
            lambda folder: os.truncate(folder / "model.safetensors", 20_000),
            4,
            ("model.safetensors", "Download"),
        ),
        (shard, 4, ("model-00002-of-00002.safetensors", "Download")),
        (
            lambda folder: edit_weights(folder, lambda tensors: tensors.pop(DOWN)),
            4,
            (f"1 missing: '{DOWN}'", "download both again"),
        ),
        (
            lambda folder: edit_weights(
                folder, lambda tensors: tensors.update({DOWN: torch.zeros(32, 60)})
            ),
            4,
            (f"1 misshapen: '{DOWN}' in model.safetensors is [32, 60], not [32, 64]",),
        ),
        (
            lambda folder: edit_weights(
                folder, lambda tensors: tensors.update(extra=torch.zeros(1))
            ),
            4,
            ("1 surplus: 'extra'",),
        ),
        (lambda folder: edit_weights(folder, poison), 4, (DOWN, "nan at [3, 5]", "Download")),
        (
            lambda folder: edit_weights(folder, lambda tensors: tensors[NORM].fill_(float("inf"))),
            4,
            (NORM, "inf at [0]"),
        ),
        (lambda folder: edit_config(folder, model_type="lama"), 5, ("'lama'", "'llama'")),
        (lambda folder: edit_config(folder, model_type="mamba"), 5, ("'mamba'",)),
        (lambda folder: edit_config(folder, hidden_size=None), 4, ("hidden_size",)),
        (lambda folder: edit_config(folder, hidden_size="large"), 4, ("hidden_size", "large")),
        (
            lambda folder: edit_config(folder, rope_parameters={"rope_type": "spiral"}),
            5,
            ("spiral",),
        ),
        (
            lambda folder: (folder / "tokenizer.json").write_text("{"),
            4,
            ("tokenizer.json", "Save it again"),
        ),
    ],
    ids=[
        "no-config",
        "broken-config",
        "no-weights",
        "truncated-weights",
        "truncated-shard",
        "missing-tensor",
        "wrong-shape",
        "surplus-tensor",
        "nan",
        "infinite-norm",
        "near-family",
        "other-family",
        "no-size",
        "word-for-a-size",
        "unknown-rope",
        "broken-tokenizer",
    ],
)
def test_damaged_model(
    refuse: Command,
    model: Path,
    damage: Callable[[Path], object],
    code: int,
    told: tuple[str, ...],
) -> None:
    damage(model)
    text = message(refuse(code, "export", model, "-o", "out", *SHAPES))
    for part in told:
        assert part in text


def test_weight_beyond_float16(refuse: Command, model: Path) -> None:
    edit_weights(model, lambda tensors: tensors[DOWN].fill_(1e6))
    text = message(refuse(4, "export", model, "-o", "out", *SHAPES, "--scheme", "none"))
    assert DOWN in text and "float16" in text and "65504" in text


@pytest.mark.parametrize(
    ("name", "code", "told"),
    [
        ("lama", 2, ("'lama' is no recipe", "llama-3.2-1b", "Did you mean 'llama'?")),
        ("llama-3.2-1", 2, ("Did you mean 'llama-3.2-1b'?",)),
        ("./no/such/folder", 4, ("'./no/such/folder'", "Check the path")),
        ("", 4, ("''", "Check the path")),
    ],
)
def test_no_such_model(refuse: Command, name: str, code: int, told: tuple[str, ...]) -> None:
    text = message(refuse(code, "export", name, "-o", "out"))
    for part in told:
        assert part in text


def test_a_hub_id_that_is_not_in_the_cache(
    refuse: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import huggingface_hub.constants

    (tmp_path / "cache").mkdir()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    text = message(refuse(4, "export", "no-such-org/no-such-model", "--local-files-only"))
    assert "no-such-org/no-such-model" in text


def test_no_model(refuse: Command) -> None:
    done = refuse(2, "export")
    assert done.err.startswith("Usage: ") and "`llm-coreml ls`" in message(done)


def test_revision_of_a_folder(refuse: Command, model: Path) -> None:
    text = message(refuse(2, "export", model, "-o", "out", "--revision", "v2"))
    assert "revision 'v2' belongs to a hub id" in text


# The settings


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (("--group-size", "24"), 5, ("24", "32")),
        (("--group-size", "0"), 2, ("0",)),
        (("--scheme", "codebook", "--codebook-rows", "0"), 2, ("0",)),
        (("--scheme", "int4-grup"), 2, ("'int4-grup'", "Did you mean 'int4-group'?")),
        (("--embedding", "int8"), 2, ("--embedding int8", "Did you mean 'int8-group'?")),
        (("--bits", "5"), 2, ("--bits is 5", "1, 2, 3, 4, 6, 8 and 16")),
        (("--bits", "four"), 2, ("'four'",)),
        (("--target", "npu"), 2, ("'npu'", "gpu, ane, cpu, all")),
        (("--target", "ane", "--scheme", "int4-group"), 5, ("Neural Engine", "--force")),
        (("--minimum-os", "iOS17"), 5, ("iOS17", "--minimum-os iOS18")),
        (("--context", "40"), 2, ("--context is 40", "multiple of 32", "32.")),
        (("--context", "96"), 2, ("--context 96", "64 positions", "use 64 or less")),
        (("--context", "32", "--seq-lengths", "1,64"), 2, ("64", "context of 32", "--context")),
        (("--kv-cache", "state", "--functions", "prefill:8,decode:1"), 2, ("its method's own",)),
        (("--seq-lengths", "2..8"), 2, ("must be a range from 1",)),
        (("--seq-lengths", "8,16"), 2, ("8,16 lacks 1", "add it")),
        (("--seq-lengths", "1,x"), 2, ("1,x", "such as 1,8,64")),
        (("--seq-lengths", ""), 2, ("--seq-lengths", "such as 1,8,64")),
        (("--seq-lengths", "1,1"), 2, ("1,1", "different")),
        (("--logits", "first"), 2, ("'first'", "'last'", "'all'")),
        (("--grup-size", "32"), 2, ("--grup-size", "Did you mean", "--group-size")),
        (("surplus",), 2, ("surplus",)),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_settings(
    refuse: Command, checkpoint: Path, words: tuple[str, ...], code: int, told: tuple[str, ...]
) -> None:
    text = message(refuse(code, "export", checkpoint, "-o", "out", *words))
    for part in told:
        assert part in text


def test_unknown_command_and_format(refuse: Command) -> None:
    assert "No such command 'exprt'" in message(refuse(2, "exprt"))
    assert "'yaml'" in message(refuse(2, "ls", "--format", "yaml"))


# The output


def test_output_exists(refuse: Command, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/precious").write_text("keep")
    text = message(refuse(6, "export", checkpoint, "-o", "out", *SHAPES))
    assert "'out' exists already" in text and "--overwrite" in text
    # Only what an export wrote may be replaced.
    text = message(refuse(6, "export", checkpoint, "-o", "out", *SHAPES, "--overwrite"))
    assert "'out' holds 'precious', which no export wrote" in text
    assert (tmp_path / "out/precious").read_text() == "keep"
    (tmp_path / "file").write_text("keep")
    message(refuse(6, "export", checkpoint, "-o", "file", *SHAPES, "--overwrite"))
    assert (tmp_path / "file").read_text() == "keep"


@pytest.mark.parametrize("output", ["file/out", "file/deep/out"])
def test_output_below_a_file(
    refuse: Command, checkpoint: Path, tmp_path: Path, output: str
) -> None:
    (tmp_path / "file").write_text("keep")
    text = message(refuse(6, "export", checkpoint, "-o", output, *SHAPES))
    assert "file' cannot be written to; give another -o." in text


@pytest.mark.parametrize("output", ["/proc/out", "/proc/1/deep/out", "/dev/null/out"])
def test_output_where_nothing_can_be_made(refuse: Command, checkpoint: Path, output: str) -> None:
    if not Path(output).parent.exists() and not Path("/proc").exists():
        pytest.skip("This system has no /proc.")
    before = threads_and_files()
    text = message(refuse(6, "export", checkpoint, "-o", output, *SHAPES))
    assert "cannot be written" in text and "ive another -o." in text
    assert threads_and_files() == before


def test_output_without_permission(
    refuse: Command, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "closed").mkdir()
    access = os.access
    # Root may write everywhere, so the system's answer is given here.
    monkeypatch.setattr(
        os, "access", lambda path, mode: Path(path).name != "closed" and access(path, mode)
    )
    text = message(refuse(6, "export", checkpoint, "-o", "closed/out", *SHAPES))
    assert "closed' cannot be written to; give another -o." in text


def test_failed_overwrite_keeps_the_earlier_export(
    refuse: Command, bundle: Path, model: Path, tmp_path: Path
) -> None:
    shutil.copytree(bundle, tmp_path / "out")
    edit_weights(model, poison)
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    message(refuse(4, "export", model, "-o", "out", *SHAPES, "--overwrite"))
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def threads_and_files() -> int:
    """Return the number of open descriptors: a refusal leaks none."""
    return len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0


@contextmanager
def small_disk(folder: Path, kilobytes: int) -> Iterator[None]:
    """Make `folder` a disk of `kilobytes`, where one can be mounted.

    Elsewhere every single file is limited, to what fails at the same write.
    """
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
    if os.geteuid() == 0 and subprocess.run(mount, capture_output=True).returncode == 0:
        try:
            yield
        finally:
            subprocess.run(["umount", "-l", str(folder)], check=True)
        return
    previous = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    largest = {4: 4, 40: 30, 140: 50}[kilobytes]
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest << 10, previous[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, previous)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("kilobytes", [4, 40, 140], ids=["tokenizer", "lowering", "program"])
def test_disk_full(
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    checkpoint: Path,
    tmp_path: Path,
    kilobytes: int,
) -> None:
    words = ("export", checkpoint, "-o", tmp_path / "disk/out", *SHAPES)
    with small_disk(tmp_path / "disk", kilobytes):
        # coremltools leaves a temporary file open, which complains when a process ends.
        alone = kilobytes == 40
        done = run(*words) if alone else in_process(capfd, monkeypatch, *words)
        assert files_of(tmp_path / "disk") == set()
    assert done.code == 6, done.err
    assert f"The disk that holds '{tmp_path}/disk/out' is full; free some" in message(done)
    assert "Traceback" not in done.err and "ignored" not in done.err and done.out == ""


# The artifact


@pytest.fixture
def own_bundle(bundle: Path, tmp_path: Path) -> Path:
    """A copy of the exported bundle that a test may damage."""
    return Path(shutil.copytree(bundle, tmp_path / "own"))


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0xFF
    path.write_bytes(data)


def other_program(path: Path) -> None:
    """Put another program there: same format, other weights."""
    data = bytearray(path.read_bytes())
    # Inside weight.bin, which fills the end of the file but for its table of contents.
    data[data.rindex(struct.pack("<I", 0xDEADBEEF)) + 64 + 5] ^= 1
    path.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "short": lambda path: os.truncate(path, 100),
    "half": lambda path: os.truncate(path, path.stat().st_size // 2),
    "last-byte": lambda path: os.truncate(path, path.stat().st_size - 1),
    "random": lambda path: path.write_bytes(torch.randint(
        0, 256, (4096,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    ).numpy().tobytes()),
    "zeros": lambda path: path.write_bytes(bytes(4096)),
    "text": lambda path: path.write_text(TEXT * 20),
    "magic": lambda path: flip(path, 4),
    "header": lambda path: flip(path, 0),
    "folder": lambda path: (path.unlink(), path.mkdir()),
    "absent": lambda path: path.unlink(),
}  # fmt: skip


@pytest.mark.parametrize("command", ["eval", "generate", "show"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_program(
    refuse: Command, own_bundle: Path, text_file: Path, command: str, damage: str
) -> None:
    DAMAGES[damage](own_bundle / "model.pte")
    words = {
        "eval": ("--artifact-only", "--tokens", "4", "--text", text_file),
        "generate": ("-p", "The", "--max-new-tokens", "1"),
        "show": (),
    }
    text = message(refuse(7, command, own_bundle, *words[command]))
    assert "model.pte" in text or "program" in text


def test_a_measurement_vouches_for_the_file_that_the_manifest_describes(
    refuse: Command, own_bundle: Path, text_file: Path
) -> None:
    other_program(own_bundle / "model.pte")
    words = ("--artifact-only", "--tokens", "4", "--text", text_file)
    text = message(refuse(7, "eval", own_bundle, *words))
    expected = manifest_of(own_bundle)["program"]["sha256"]
    assert "SHA-256" in text and expected[:12] in text and "Export again" in text


@pytest.mark.parametrize("damage", ["empty", "half", "random", "text", "absent"])
def test_damaged_file_alone(refuse: Command, own_bundle: Path, tmp_path: Path, damage: str) -> None:
    path = (own_bundle / "model.pte").rename(tmp_path / "alone.pte")
    DAMAGES[damage](path)
    assert "alone.pte" in message(refuse(7, "show", path))


def edit_manifest(folder: Path, **changes: Any) -> None:
    write_manifest(folder, {**manifest_of(folder), **changes})


@pytest.mark.parametrize("command", [("eval",), ("generate", "-p", "The"), ("show",)])
@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (
            lambda folder: (folder / "manifest.json").unlink(),
            ("holds no manifest.json", "folder that an export wrote"),
        ),
        (
            lambda folder: edit_manifest(folder, version=4),
            ("version 4", "reads versions 1, 2 and 3", "Export again"),
        ),
        (lambda folder: (folder / "manifest.json").write_text("[1]"), ("version None",)),
        (
            lambda folder: (folder / "manifest.json").write_text("{"),
            ("manifest.json' cannot be read", "Export again"),
        ),
        (
            lambda folder: (folder / "manifest.json").write_bytes(b"\xff\xfe{}"),
            ("manifest.json' cannot be read", "Export again"),
        ),
        (
            lambda folder: edit_manifest(folder, program={}),
            ("manifest.json' is damaged at $.program", "Export again"),
        ),
    ],
    ids=["absent", "later", "list", "broken", "not-utf-8", "no-program"],
)
def test_damaged_manifest(
    refuse: Command,
    own_bundle: Path,
    command: tuple[str, ...],
    damage: Callable[[Path], object],
    told: tuple[str, ...],
) -> None:
    damage(own_bundle)
    text = message(refuse(7, command[0], own_bundle, *command[1:]))
    for part in told:
        assert part in text


@pytest.mark.parametrize("command", [("eval",), ("generate", "-p", "The"), ("show",)])
def test_no_such_bundle(refuse: Command, command: tuple[str, ...]) -> None:
    assert "'gone'" in message(refuse(7, command[0], "gone", *command[1:]))


# eval and generate


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "cannot be read"),
        (b"\xff\xfe\x00", "Give a UTF-8 file"),
        (b"", "is empty; give a text"),
        (b" \n\t", "is empty; give a text"),
    ],
    ids=["absent", "not-utf-8", "empty", "blank"],
)
def test_text(
    refuse: Command, own_bundle: Path, tmp_path: Path, content: bytes | None, told: str
) -> None:
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    text = message(refuse(2, "eval", own_bundle, "--text", path, "--artifact-only"))
    assert f"--text '{path}'" in text and told in text


def test_text_that_is_a_folder(refuse: Command, own_bundle: Path, tmp_path: Path) -> None:
    assert "cannot be read" in message(refuse(2, "eval", own_bundle, "--text", tmp_path))


@pytest.mark.parametrize("tokens", ["0", "-5", "1" + 30 * "0"])
def test_no_tokens_to_score(refuse: Command, own_bundle: Path, tokens: str) -> None:
    text = message(refuse(2, "eval", own_bundle, "--tokens", tokens))
    assert f"--tokens is {tokens}; it must be a whole number from 1 to 2147483647." in text


def test_another_model_than_was_exported(
    refuse: Command, own_bundle: Path, model: Path, text_file: Path
) -> None:
    edit_weights(model, lambda tensors: tensors[NORM].add_(0.5))
    words = ("--text", text_file, "--tokens", "4", "--model", model)
    text = message(refuse(4, "eval", own_bundle, *words))
    assert f"'{model}' holds other weights than were exported" in text and "--model" in text


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--max-new-tokens", "0"), ("0", "from 1 to")),
        (("--temperature", "-1"), ("temperature is -1.0",)),
        (("--temperature", "nan"), ("temperature is nan",)),
        (("--top-p", "0"), ("top_p is 0.0",)),
        (("--seed", "1" + 30 * "0"), ("seed must be a whole number from 0",)),
        (("--device", "hpu"), ("The device 'hpu' cannot be used here",)),
        (("-p", TEXT * 3), ("do not fit its 64 positions", "--context")),
    ],
    ids=["no-tokens", "negative", "nan", "nucleus", "seed", "device", "long-prompt"],
)
def test_generate(
    refuse: Command, bundle: Path, words: tuple[str, ...], told: tuple[str, ...]
) -> None:
    text = message(refuse(2, "generate", bundle, "-p", "The", *words))
    for part in told:
        assert part in text


def test_results_that_cannot_be_written(refuse: Command, own_bundle: Path, text_file: Path) -> None:
    (own_bundle / "results.json").mkdir()
    words = ("--text", text_file, "--tokens", "4", "--artifact-only")
    text = message(refuse(6, "eval", own_bundle, *words))
    assert "results.json' cannot be written" in text


# The calibration text


@pytest.mark.parametrize(
    ("content", "flags", "told"),
    [
        (TEXT.encode(), (), ("'c.txt' holds 139 tokens", "--calibration-tokens 16384", "longer")),
        (b"", ("--calibration-tokens", "5"), ("'c.txt' holds 0 tokens",)),
        (None, (), ("'c.txt' cannot be read", "'bundled'")),
        (b"\xff\xfe", (), ("'c.txt' cannot be read", "utf-8")),
        (TEXT.encode(), ("--calibration-tokens", "0"), ("--calibration-tokens is 0", "at least")),
        (
            TEXT.encode(),
            ("--scheme", "codebook", "--codebook-vector", "2"),
            ("--calibrate cannot choose the codes of 'codebook 4 bit for 2 rows", "drop it"),
        ),
        (TEXT.encode(), ("--tune", "-3"), ("--tune is -3", "number of steps")),
        (TEXT.encode(), ("--scheme", "none"), ("--calibrate chooses codes", "drop it")),
    ],
)
def test_calibration_text(
    refuse: Command,
    checkpoint: Path,
    tmp_path: Path,
    content: bytes | None,
    flags: tuple[str, ...],
    told: tuple[str, ...],
) -> None:
    if content is not None:
        (tmp_path / "c.txt").write_bytes(content)
    words = ("export", checkpoint, "-o", "out", *SHAPES, "--calibrate", "c.txt", *flags)
    text = message(refuse(2, *words))
    for part in told:
        assert part in text


def test_calibration_on_the_text_that_exports_are_measured_on(
    refuse: Command, checkpoint: Path, tmp_path: Path
) -> None:
    heldout = (bundled_model() / "heldout.txt").read_text(encoding="utf-8")
    (tmp_path / "c.txt").write_text(TEXT + heldout[70_000:72_000])
    words = ("export", checkpoint, "-o", "out", *SHAPES, "--calibrate", "c.txt")
    assert "shares a passage with the held-out text" in message(refuse(2, *words))


def test_calibration_without_a_tokenizer(refuse: Command, model: Path) -> None:
    for file in model.glob("tokenizer*"):
        file.unlink()
    words = ("export", model, "-o", "out", *SHAPES, "--calibrate", "bundled")
    assert "without a tokenizer" in message(refuse(2, *words))


def test_activations_that_overflow(refuse: Command, model: Path) -> None:
    norm = "model.layers.0.post_attention_layernorm.weight"
    edit_weights(model, lambda tensors: tensors[norm].fill_(1e25))
    words = ("export", model, "-o", "out", *SHAPES, "--calibrate", "bundled")
    precise = ("--calibration-tokens", "64", "--compute-precision", "fp32")
    text = message(refuse(4, *words, *precise))
    assert "layers.0.mlp.down_proj gets inf or NaN" in text and "--calibrate" in text


# What is printed


HOSTILE = "\x1b[2Jx\u202ey\x07\n"


@pytest.mark.parametrize(
    "words",
    [
        (HOSTILE,),
        (f"--{HOSTILE}",),
        ("export", "m", "--bits", HOSTILE),
        ("export", "./m", "--target", HOSTILE),
        ("export", "m", f"--{HOSTILE}"),
        ("export", f"./{HOSTILE}"),
        ("show", HOSTILE),
        ("ls", HOSTILE),
        ("ls", "--format", "x" * 100_000),
        ("export", "m", "--seq-lengths", "1," * 50_000),
    ],
)
def test_words_of_the_command_are_printable(refuse: Command, words: tuple[str, ...]) -> None:
    code = 7 if words[0] == "show" else 4 if "./" in words[-1] else 2
    done = refuse(code, *words)
    text = message(done)
    assert text.isprintable() and len(text) <= 1000
    assert all(line.isprintable() for line in done.err.splitlines())
    if HOSTILE in words[-1]:
        assert r"x\u202ey\x07\n" in text  # click itself drops the escape sequence


def test_names_in_a_checkpoint_are_printable(refuse: Command, model: Path) -> None:
    edit_config(model, model_type=HOSTILE + "y" * 10**6)
    text = message(refuse(5, "export", model, "-o", "out", *SHAPES))
    assert r"\x1b[2J" in text and text.isprintable() and len(text) <= 1000
    edit_config(model, model_type="llama")
    edit_weights(model, lambda tensors: tensors.update({HOSTILE * 1000: torch.zeros(1)}))
    text = message(refuse(4, "export", model, "-o", "out", *SHAPES))
    assert r"\x1b[2J" in text and text.isprintable() and len(text) <= 1000


def test_notes_and_tables_are_printable(
    own_bundle: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = {**manifest_of(own_bundle)["source"], "name": HOSTILE}
    edit_manifest(own_bundle, source=source)
    done = in_process(capfd, monkeypatch, "show", own_bundle)
    assert done.code == 0 and r"\x1b[2Jx\u202ey" in done.out
    assert all(line.isprintable() for line in done.out.splitlines())
    stages = io.StringIO()
    Stages(stages).note(HOSTILE)
    assert stages.getvalue() == r"\x1b[2Jx\u202ey\x07\n" + "\n"
