"""The odd disks, names, permissions, streams and environments that `hostile_disk.py` tries.

cases = [case for group in GROUPS for case in group()]
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

LONG, LONGEST = 300 * "n", "/".join(50 * [100 * "n"])
NO_TEXT = "caf\udce9"
SHAPES = ("--context", "32", "--seq-lengths", "1,8", "--bits", "16")
READERS = {
    "eval": ("eval", "BUNDLE", "--artifact-only", "--tokens", "8"),
    "generate": ("generate", "BUNDLE", "-p", "T h e", "--max-new-tokens", "2"),
    "show": ("show", "BUNDLE"),
    "diff": ("diff", "BUNDLE", "BUNDLE", "--tokens", "8"),
    "inspect": ("inspect", "BUNDLE", "--numerics", "--tokens", "8"),
    "run": ("run", "BUNDLE"),
}


@dataclass
class Case:
    """One call.

    Attributes:
        name: What is odd.
        words: The call; BUNDLE and MODEL stand for folders of the case's own.
        prepare: Makes the odd thing, in the folder that the case has for itself.
        environment: Variables; None takes one away.
        nobody: Run without root's rights.
        largest_file: Bytes.
        streams: What takes the place of descriptors: a path, or None to close one.
        fresh: Start a new interpreter.
        codes: Exit codes that are right; none is any of ours but 1.
    """

    name: str
    words: tuple[str, ...]
    prepare: Callable[[Path], object] = lambda folder: None
    environment: dict[str, str | None] = field(default_factory=dict)
    nobody: bool = False
    largest_file: int | None = None
    streams: dict[int, str | None] = field(default_factory=dict)
    fresh: bool = False
    codes: tuple[int, ...] = (0, 2, 4, 5, 6, 7)


def export(*more: str, model: str = "MODEL") -> tuple[str, ...]:
    """Return the words of an export; `-o out` unless others are given."""
    output = () if "-o" in more else ("-o", "out")
    cached = () if "--cache" in more else ("--no-cache",)
    # A plan decides what the bits would.
    shapes = SHAPES[:-2] if "--plan" in more else SHAPES
    return ("export", model, *output, *shapes, *cached, *more)


def reading(bundle: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield every verb that reads a bundle, and its words for the one at `bundle`."""
    for verb, words in READERS.items():
        yield verb, tuple(bundle if word == "BUNDLE" else word for word in words)


def copied(folder: Path, files: Mapping[str, bytes | None] = MappingProxyType({})) -> None:
    """Put the bundle at `out`, and files into it; None removes one."""
    shutil.copytree(folder / "bundle", folder / "out")
    for name, content in files.items():
        path = folder / "out" / name
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content)


def overwriting() -> Iterator[Case]:
    """Yield exports over what is there already."""
    words = export("--overwrite")

    def linked(folder: Path, target: str) -> None:
        (folder / "foreign").mkdir()
        (folder / "foreign/thesis.txt").write_text("mine")
        (folder / "out").symlink_to(folder / target)

    def listing_others(folder: Path) -> None:
        copied(folder)
        (folder / "victim.txt").write_text("mine")
        path = folder / "out/manifest.json"
        manifest = json.loads(path.read_text())
        manifest["files"]["../victim.txt"] = manifest["files"].pop("tokenizer.json")
        path.write_text(json.dumps(manifest))

    def link_inside(folder: Path) -> None:
        copied(folder, {"tokenizer.json": None})
        (folder / "victim.txt").write_text("mine")
        (folder / "out/tokenizer.json").symlink_to(folder / "victim.txt")

    def socket_at(folder: Path) -> None:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(str(folder / "out"))

    made: dict[str, Callable[[Path], object]] = {
        "a file": lambda f: (f / "out").write_text("mine"),
        "an empty folder": lambda f: (f / "out").mkdir(),
        "an earlier export": lambda f: copied(f),
        "an export with another's file": lambda f: copied(f, {"thesis.txt": b"mine"}),
        "an export with another's folder": lambda f: (copied(f), (f / "out/mine").mkdir()),
        "an export whose program is another": lambda f: copied(f, {"model.pte": b"mine"}),
        "a program without a manifest": lambda f: copied(f, {"manifest.json": None}),
        "an export with a broken manifest": lambda f: copied(f, {"manifest.json": b"{"}),
        "an export with another's results": lambda f: copied(f, {"results.json": b"[1]"}),
        "a manifest that lists others' files": listing_others,
        "an export with a link out": link_inside,
        "a link to an export": lambda f: (f / "out").symlink_to(f / "bundle"),
        "a link to another's folder": lambda f: linked(f, "foreign"),
        "a link to nothing": lambda f: (f / "out").symlink_to(f / "gone"),
        "a link to itself": lambda f: (f / "out").symlink_to("out"),
        "a fifo": lambda f: os.mkfifo(f / "out"),
        "a socket": socket_at,
    }
    for name, prepare in made.items():
        yield Case(f"--overwrite over {name}", words, prepare)
    for name, output in {
        "the folder that it runs in": ".",
        "its parent": "..",
        "the root": "/",
        "the model": "MODEL",
        "a device": "/dev/null",
        "nothing": "",
    }.items():
        yield Case(f"--overwrite over {name}", export("-o", output, "--overwrite"))
    yield Case("export below a file", export("-o", "file/out"), lambda f: (f / "file").touch())
    yield Case("export into the model", export("-o", "MODEL/out"))
    yield Case("export without --overwrite", export(), lambda f: copied(f))


def links() -> Iterator[Case]:
    """Yield links that lead nowhere."""

    def loop(folder: Path) -> None:
        (folder / "a").symlink_to("b")
        (folder / "b").symlink_to("a")

    def loop_inside(folder: Path, name: str) -> None:
        path = folder / name
        path.unlink()
        path.symlink_to(path.name)

    yield Case("export below a loop", export("-o", "a/out"), loop)
    yield Case("export of a loop", export(model="./a"), loop)
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        yield Case(
            f"{name} of a model is a loop", export(), lambda f, n=name: loop_inside(f, f"model/{n}")
        )
    yield Case("--cache is a loop", export("--cache", "a"), loop)
    yield Case("--calibrate is a loop", export("--calibrate", "a"), loop)
    for verb, words in reading("a"):
        yield Case(f"{verb} of a loop", words, loop)
    for verb, words in reading("BUNDLE"):
        yield Case(
            f"{verb} of a program that is a loop",
            words,
            lambda f: loop_inside(f, "bundle/model.pte"),
        )


def permissions() -> Iterator[Case]:
    """Yield what a plain user must not read or write."""

    def closed(folder: Path, name: str, mode: int = 0) -> None:
        path = folder / name
        if not path.exists():
            path.mkdir()
        path.chmod(mode)

    cases: dict[str, tuple[tuple[str, ...], str, int]] = {
        "output in a folder that is read-only": (export("-o", "shut/out"), "shut", 0o555),
        "output in a folder that is closed": (export("-o", "shut/out"), "shut", 0),
        "a model's folder": (export(), "model", 0),
        "a model's config.json": (export(), "model/config.json", 0),
        "a model's weights": (export(), "model/model.safetensors", 0),
        "a model's tokenizer": (export(), "model/tokenizer.json", 0),
        "--cache": (export("--cache", "shut"), "shut", 0o555),
        "--cache, closed": (export("--cache", "shut"), "shut", 0),
        "--calibrate": (export("--calibrate", "model/config.json"), "model/config.json", 0),
        "results of eval": (READERS["eval"], "bundle", 0o555),
        "output of run": (("run", "BUNDLE", "-i", "x.npz", "-o", "shut/y.npz"), "shut", 0o555),
        "the folder that it runs in": (export(), ".", 0o555),
    }
    for name, (words, path, mode) in cases.items():
        yield Case(
            f"no permission: {name}",
            words,
            lambda f, p=path, m=mode: closed(f, p, m),
            nobody=True,
        )
    for verb, words in reading("BUNDLE"):
        for path in ("bundle", "bundle/model.pte", "bundle/manifest.json"):
            yield Case(
                f"no permission: {path} for {verb}",
                words,
                lambda f, p=path: closed(f, p),
                nobody=True,
            )


def names() -> Iterator[Case]:
    """Yield names that are too long, or no text, or of nobody."""
    for about, name in {
        "too long": LONG,
        "of too long a path": LONGEST,
        "no text": NO_TEXT,
        "a home that is nobody's": "~nouser/x",
        "with control characters": "a\x1b[31m\nb",
    }.items():
        yield Case(f"output {about}", export("-o", name))
        yield Case(f"model {about}", export(model=name))
        yield Case(f"model, a path {about}", export(model=f"./{name}"))
        yield Case(f"recipe {about}", export(model=f"{name}.yaml"))
        for flag in ("--cache", "--calibrate", "--plan"):
            yield Case(f"{flag} {about}", export(flag, name))
        for verb, words in reading(name):
            yield Case(f"{verb} of a name {about}", words)
        for verb in ("eval", "diff", "inspect"):
            yield Case(f"--text of {verb} {about}", (*READERS[verb], "--text", name))
        yield Case(f"--inputs {about}", (*READERS["run"], "-i", name))

    def moved(folder: Path, name: str) -> None:
        (folder / "bundle").rename(folder / name)

    for verb, words in reading(NO_TEXT):
        yield Case(f"{verb} of a bundle whose name is no text", words, lambda f: moved(f, NO_TEXT))


def disks() -> Iterator[Case]:
    """Yield files that must not grow, and disks that are full."""
    for most in (0, 100, 10_000):
        yield Case(f"export, files of {most} bytes", export(), largest_file=most)
        yield Case(
            f"export with a cache, files of {most} bytes",
            export("--cache", "cache"),
            largest_file=most,
        )
        yield Case(f"eval, files of {most} bytes", READERS["eval"], largest_file=most)
    for about, words in {
        "export": export("-o", "disk/out"),
        "export, its cache": export("--cache", "disk/cache"),
    }.items():
        yield Case(f"a full disk: {about}", words, mounted)
    yield Case("a full disk: TMPDIR", export(), mounted, {"TMPDIR": "disk"})


def mounted(folder: Path) -> None:
    """Mount a disk of 32 KB at `disk`; PermissionError if this user may not."""
    (folder / "disk").mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=32k,mode=777", "tmpfs", str(folder / "disk")]
    if subprocess.run(words, capture_output=True).returncode:
        raise PermissionError("mount")


def streams() -> Iterator[Case]:
    """Yield streams that nobody reads."""
    every = {"export": export(), "ls": ("ls",), **READERS}
    every |= {"show, JSON": (*READERS["show"], "--format", "json")}
    for verb, words in every.items():
        yield Case(f"{verb}, stdout full", words, streams={1: "/dev/full"})
        yield Case(f"{verb}, stdout closed", words, streams={1: None})
        yield Case(f"{verb}, stderr full", words, streams={2: "/dev/full"})
        yield Case(f"{verb}, no stream at all", words, streams={0: None, 1: None, 2: None})
    yield Case("generate, stdin closed", READERS["generate"], streams={0: None})
    yield Case("generate --chat, stdin closed", ("generate", "BUNDLE", "--chat"), streams={0: None})
    yield Case(
        "a wrong option, no stream at all", ("show", "--x"), streams={0: None, 1: None, 2: None}
    )


def environments() -> Iterator[Case]:
    """Yield variables that make no sense, or are not there."""
    variables: list[dict[str, str | None]] = [
        *({"COLUMNS": value} for value in ("0", "1", "-1", "x", 30 * "9", "")),
        *({"LINES": value} for value in ("0", "x")),
        *({"TERM": value} for value in (None, "dumb", "x\x1b[31m")),
        *({"TMPDIR": value} for value in ("gone", "file", "", 5000 * "x", "/proc")),
        *({"HOME": value} for value in (None, "gone", "", "/proc", NO_TEXT)),
        *({"LLM_COREML_CACHE": value} for value in ("file", "", "/proc/x", NO_TEXT, 5000 * "x")),
        {"PATH": None},
        {"TZ": "x/y/z"},
        {"HF_HOME": "file"},
        {"OMP_NUM_THREADS": "x"},
    ]
    for environment in variables:
        name, value = next(iter(environment.items()))
        about = f"${name} " + ("unset" if value is None else repr(value[:20]))
        words = export("--cache", "cache") if name == "HOME" else export()
        if name in ("HOME", "LLM_COREML_CACHE"):
            words = tuple(word for word in export() if word != "--no-cache")
        yield Case(f"export, {about}", words, lambda f: (f / "file").touch(), environment)
        yield Case(f"show, {about}", READERS["show"], lambda f: (f / "file").touch(), environment)
        if name in ("COLUMNS", "TERM"):
            yield Case(f"eval, {about}", READERS["eval"], environment=environment)
    for variables_at_start in (
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"PYTHONIOENCODING": "ascii"},
        {"PYTHONIOENCODING": "utf-16"},
        {"LC_ALL": "x_Y.z"},
    ):
        about = " ".join(f"{key}={value}" for key, value in variables_at_start.items())
        for verb in ("show", "generate"):
            words = READERS[verb]
            yield Case(f"{verb}, {about}", words, environment=dict(variables_at_start), fresh=True)
        yield Case(
            f"a wrong name, {about}",
            ("show", "é"),
            environment=dict(variables_at_start),
            fresh=True,
        )
    gone = lambda folder: (folder / "gone").mkdir()  # noqa: E731
    for verb, words in {"export": export(), "ls": ("ls",), **READERS}.items():
        yield Case(f"{verb} in a folder that is gone", words, gone, {"GONE": "1"}, codes=(1,))


GROUPS = (overwriting, links, permissions, names, disks, streams, environments)
